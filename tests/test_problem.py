"""Every bad argument is refused with its name, its axis and its numbers."""

import pytest

from natcore.problem import Call, Problem, Window, call_of, check_operand, check_result, problem_of
from natcore.views import Device, View, contiguous_strides

CPU = Device("cpu")


def view(*shape: int, dtype: str = "float32", device: Device = CPU, strides: tuple[int, ...] | None = None) -> View:
    return View(0, shape, contiguous_strides(shape) if strides is None else strides, dtype, device)


def views(**changes: View | None) -> dict[str, View | None]:
    q = view(2, 8, 9, 4, 16)
    return {"q": q, "k": q, "v": q} | changes


def posed(rank: int = 2, kernel: int = 3, **changes: View | None) -> Problem:
    return problem_of(Window.of(rank, kernel), views(**changes))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kernel_size": 0}, ["kernel_size", "axis 0", "0"]),
        ({"kernel_size": (3, -1)}, ["kernel_size", "axis 1", "-1"]),
        ({"kernel_size": 3, "stride": (1, 4)}, ["stride 4 > kernel_size 3", "axis 1"]),
        ({"kernel_size": 3, "dilation": 0}, ["dilation", "axis 0", "0"]),
        ({"kernel_size": (3, 3, 3)}, ["kernel_size", "3 entries", "2 spatial"]),
        ({"kernel_size": 3.0}, ["kernel_size", "axis 0", "int", "float"]),
        ({"kernel_size": True}, ["kernel_size", "axis 0", "int", "bool"]),
        ({"kernel_size": 3, "is_causal": 1}, ["is_causal", "axis 0", "bool", "int"]),
    ],
)
def test_bad_windows(arguments, words):
    with pytest.raises(ValueError) as error:
        Window.of(2, **arguments)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": view(2, 8, 4, 16)}, ["q", "4 axes", "na2d"]),
        ({"q": view(2, 8, 2, 4, 16)}, ["3 > extent 2", "axis 1"]),
        ({"q": view(2, 8, 9, 0, 16)}, ["heads is 0"]),
        ({"q": view(2, 0, 9, 4, 16)}, ["extent 0", "axis 0"]),
        ({"q": view(2, 8, 9, 4, 16, dtype="int32")}, ["q", "int32", "float16"]),
        ({"k": view(2, 8, 9, 4, 8)}, ["k", "(2, 8, 9, 4, 8)", "(2, 8, 9, 4, 16)", "axis 4"]),
        ({"k": view(2, 8, 9, 3, 16), "v": view(2, 8, 9, 3, 16)}, ["4 heads", "3", "multiple"]),
        ({"v": view(2, 7, 9, 4, 16)}, ["v", "axis 1"]),
        ({"v": view(2, 8, 9, 4, 16, dtype="float16")}, ["v", "float16", "float32"]),
        ({"v": view(2, 8, 9, 4, 16, device=Device("cuda", 1))}, ["v", "cuda:1", "cpu"]),
        ({"k": view(2, 8, 9, 4, 16, strides=(1, 1, 1, 1, 2))}, ["k", "stride 2", "last axis", "contiguous"]),
        ({"rpb": view(4, 5, 7)}, ["rpb", "(4, 5, 7)", "(4, 5, 5)", "axis 2"]),
        ({"rpb": view(4, 5, 5, dtype="float64")}, ["rpb", "float64", "float32"]),
        ({"additional_keys": view(2, 3, 4, 16)}, ["additional_keys and additional_values"]),
        (
            {"additional_keys": view(2, 3, 4, 16), "additional_values": view(2, 2, 4, 16)},
            ["additional_values", "axis 1"],
        ),
        (
            {"additional_keys": view(2, 0, 4, 16), "additional_values": view(2, 0, 4, 16)},
            ["additional_keys", "extra >= 1"],
        ),
        ({"q": None}, ["q is None"]),
    ],
)
def test_bad_problems(changes, words):
    with pytest.raises(ValueError) as error:
        posed(**changes)
    assert all(word in str(error.value) for word in words), error.value


def test_kernel_times_dilation_must_fit():
    with pytest.raises(ValueError, match=r"kernel_size 3 \* dilation 3 = 9 > extent 8 on axis 0"):
        problem_of(Window.of(2, 3, dilation=3), views())


def test_results_must_be_writable_memory():
    problem = posed()
    broadcast = view(2, 8, 9, 4, 16, strides=(0, 576, 64, 16, 1))
    check_operand(problem, "q", broadcast, CPU)
    with pytest.raises(ValueError, match=r"out has stride 0 on axis 0"):
        check_result(problem, "out", broadcast, CPU)


def test_a_call_survives_json():
    window = Window.of(2, (3, 4), stride=2, dilation=(1, 2), is_causal=(True, False))
    given = views(rpb=view(4, 5, 7), q=view(2, 8, 9, 4, 16, strides=(1728, 216, 24, 16, 1)))
    call = call_of("forward", problem_of(window, given), given)
    again = Call.from_json(call.to_json())
    assert again == call
    assert hash(again) == hash(call)


def test_axes_of_size_one_share_a_call():
    one = problem_of(Window.of(1, 1), {n: view(1, 1, 1, 8) for n in "qkv"})
    strange = {n: view(1, 1, 1, 8, strides=(77, 3, 5, 1)) for n in "qkv"}
    assert call_of("forward", one, strange) == call_of("forward", one, {n: view(1, 1, 1, 8) for n in "qkv"})
