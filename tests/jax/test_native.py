"""The native execute stage without a GPU: a call frame made by hand, a launch function that records."""

from __future__ import annotations

import ctypes
import struct
import threading
from ctypes import c_int64, c_void_p

import pytest

from jax_nat import ffi_abi, handler
from jax_nat.ffi_abi import Api, Buffer, CallFrame
from jax_nat.flat_plan import ALIGNMENT, MESSAGES, FlatPlan, PlanTable
from jax_nat.gate import guarded
from jax_nat.numba_handler import compile_handler
from jax_nat.spec import Source, Spec
from natcore.planning import Config, Constant, KernelSpec, Launch, Operand, Plan, Scale, Workspace
from natcore.problem import OPERANDS, Problem, Window, call_of
from natcore.views import Device, View, contiguous_strides

STREAM, DEVICE = 0x5157, 3
LaunchType = ctypes.CFUNCTYPE(ctypes.c_int32, c_void_p, c_void_p, c_void_p, c_void_p)


class Recorder:
    """A native handler around a recording cuLaunchKernelEx, and an XLA that answers it."""

    def __init__(self) -> None:
        self.table = PlanTable(size=2)
        self.launches: list[tuple] = []
        self.errors: list[tuple[bytes, int]] = []
        self.prepared: list[Spec] = []
        self.plans: dict[int, FlatPlan] = {}
        self.code = 0
        self.formats: list[str] = []
        launch = LaunchType(self._launch)
        texts = [f"code {code}".encode() for code in range(MESSAGES)]
        messages = (ctypes.c_char_p * MESSAGES)(*texts)
        workspace_message = ctypes.create_string_buffer(b"small workspace")
        self.address = compile_handler(
            cell=self.table.cell,
            prepare=guarded(self._prepare),
            cu_launch=ffi_abi.address_of(launch),
            workspace_message=ctypes.addressof(workspace_message),
            messages=ctypes.addressof(messages),
        )
        self.held = (launch, messages, workspace_message)
        self.handler = ffi_abi.HandlerType(self.address)
        self.api = Api(
            error_create=ffi_abi.ErrorCreate(self._error),
            stream_get=ffi_abi.ContextGet(lambda arguments: self._answer(arguments, STREAM)),
            device_ordinal_get=ffi_abi.ContextGet(lambda arguments: self._answer(arguments, DEVICE)),
        )

    def _answer(self, arguments, value):
        assert arguments.contents.struct_size == ctypes.sizeof(ffi_abi.ContextArgs)
        assert arguments.contents.ctx == 0xC0
        arguments.contents.out = value
        return None

    def _error(self, arguments):
        self.errors.append((arguments.contents.message, arguments.contents.code))
        return 0xE44

    def _prepare(self, frame):
        self.prepared.append(handler.spec_of(frame))
        self.table.add(self.plans[ffi_abi.integer_attribute(frame, 0)])

    def _launch(self, config, kernel, pointers, extra):
        *grid_block, attributes, count = struct.unpack("=7I4x2QI", ctypes.string_at(config, 52))
        grid_block = (*grid_block, *(ctypes.string_at(attributes + 72 * i, 72) for i in range(count)))
        slots = ctypes.cast(pointers, ctypes.POINTER(c_void_p))
        values = [
            struct.unpack(f"={f}", ctypes.string_at(slots[i], struct.calcsize(f)))[0]
            for i, f in enumerate(self.formats)
        ]
        self.launches.append((kernel, grid_block, values, extra))
        return self.code

    def run(self, spec: Spec, args: list[tuple[int, tuple]], rets: list[tuple[int, tuple]]) -> int | None:
        frame = CallFrame(struct_size=ctypes.sizeof(CallFrame), ctx=0xC0, stage=3)
        frame.api = ctypes.pointer(self.api)
        held = [_fill(frame.args, args), _fill(frame.rets, rets)]
        key, text = c_int64(spec.key), spec.text.encode()
        scalar = ffi_abi.Scalar(5, ctypes.addressof(key))
        copy = ctypes.create_string_buffer(text)
        span = ffi_abi.ByteSpan(ctypes.addressof(copy), len(text))
        frame.attrs.size = 2
        frame.attrs.values = (c_void_p * 2)(ctypes.addressof(scalar), ctypes.addressof(span))
        error = self.handler(ctypes.addressof(frame))
        del held
        return error


def _fill(group, buffers):
    held = []
    pointers = (ctypes.POINTER(Buffer) * len(buffers))()
    for i, (address, dims) in enumerate(buffers):
        buffer = Buffer(data=address, rank=len(dims), dims=(c_int64 * len(dims))(*dims))
        held.append(buffer)
        pointers[i] = ctypes.pointer(buffer)
    group.size, group.buffers = len(buffers), pointers
    return held, pointers


def _spec(scale: float = 0.5, config: Config | None = None, batch: int = 1) -> Spec:
    problem = Problem(Window.of(1, 3), batch, (8,), 1, 1, 4, 4, 0, "float32", None)
    views = {
        name: View(0, problem.shapes[name], contiguous_strides(problem.shapes[name]), "float32", Device("cpu"))
        for name in ("q", "k", "v", "out")
    }
    sources = {"q": Source(False, 0, 0), "k": Source(False, 0, 16), "v": Source(False, 1, 0), "out": Source(True, 0, 0)}
    call = call_of("forward", problem, views)
    return Spec(call, scale, config, tuple(sources.get(name) for name in OPERANDS["forward"]), 1)


def _plan(workspace_bytes: int = 64) -> Plan:
    kernel = KernelSpec("kernel", (), "sm_90a")
    first = (Operand(0), Operand(1), Operand(3), Workspace(32), Scale("float32", 2.0), Constant(b"abcdefghi"))
    second = (Operand(OPERANDS["forward"].index("out")), Scale("float64"), Operand(2))
    return Plan(
        (
            Launch(kernel, (5, 6, 7), (128, 2, 1), 4096, first),
            Launch(kernel, (1, 1, 1), (32, 1, 1), 0, second, overlaps=True),
        ),
        workspace_bytes,
    )


@pytest.fixture(scope="module")
def compiled():
    return Recorder()


@pytest.fixture
def recorder(compiled):
    compiled.launches.clear()
    compiled.errors.clear()
    compiled.prepared.clear()
    compiled.code = 0
    return compiled


WORKSPACE = (0x9001, (64 + ALIGNMENT - 1,))


def test_a_missing_plan_is_prepared_once_and_all_parameters_arrive(recorder):
    spec = _spec(scale=0.75)
    recorder.plans[spec.key] = FlatPlan(_plan(), (0xAA, 0xBB), spec, DEVICE)
    recorder.formats = ["Q", "Q", "Q", "Q", "f", "9s"]
    for out in (0x3000, 0x4000):
        buffers = [(0x1000, (1,)), (0x2000, (1,))], [(out, (1,)), WORKSPACE]
        assert recorder.run(spec, *buffers) is None
    assert recorder.prepared == [spec]
    kernel, config, values, extra = recorder.launches[0]
    assert (kernel, extra) == (0xAA, None)
    assert config == (5, 6, 7, 128, 2, 1, 4096, STREAM)
    assert values == [0x1000, 0x1010, 0, 0x9100 + 32, 1.5, b"abcdefghi"]
    recorder.formats = ["Q", "d", "Q"]
    recorder.launches.clear()
    recorder.run(spec, *buffers)
    kernel, config, values, _ = recorder.launches[1]
    assert kernel == 0xBB
    assert config[:8] == (1, 1, 1, 32, 1, 1, 0, STREAM)
    (attribute,) = config[8:]  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION is allowed
    assert attribute == struct.pack("=i4xi60x", 6, 1)
    assert values == [0x4000, 0.75, 0x2000]


def test_a_plan_without_launches_does_nothing(recorder):
    spec = _spec(scale=0.125)
    recorder.plans[spec.key] = FlatPlan(Plan((), 0), (), spec, DEVICE)
    assert recorder.run(spec, [], []) is None
    assert recorder.launches == recorder.errors == []


def test_a_failed_launch_becomes_an_xla_error(recorder):
    spec = _spec(scale=0.25)
    recorder.plans[spec.key] = FlatPlan(_plan(), (1, 2), spec, DEVICE)
    recorder.formats = []
    for code, message in ((700, b"code 700"), (-1, b"code 999"), (5000, b"code 999")):
        recorder.code = code
        recorder.errors.clear()
        assert recorder.run(spec, [(1, (1,)), (2, (1,))], [(3, (1,)), WORKSPACE]) == 0xE44
        assert recorder.errors == [(message, ffi_abi.INTERNAL)]


@pytest.mark.parametrize("rets", [[(3, (1,))], [(3, (1,)), (0x9001, (64,))]], ids=["none", "small"])
def test_a_workspace_of_another_device_is_refused(recorder, rets):
    spec = _spec(scale=0.25, batch=2)
    recorder.plans[spec.key] = FlatPlan(_plan(), (1, 2), spec, DEVICE)
    assert recorder.run(spec, [(1, (1,)), (2, (1,))], rets) == 0xE44
    assert recorder.errors == [(b"small workspace", ffi_abi.INTERNAL)]
    assert recorder.launches == []


def test_a_failed_preparation_becomes_an_xla_error(recorder):
    assert recorder.run(_spec(scale=17.0), [], []) == 0xE44
    ((message, code),) = recorder.errors
    assert message.startswith(b"natcore: KeyError")
    assert code == ffi_abi.INTERNAL


def test_the_handler_answers_metadata(recorder):
    metadata = ffi_abi.Metadata(struct_size=ctypes.sizeof(ffi_abi.Metadata))
    extension = ffi_abi.MetadataExtension(ffi_abi.Extension(32, ffi_abi.METADATA_EXTENSION, None))
    extension.metadata = ctypes.pointer(metadata)
    frame = CallFrame(extension_start=ctypes.addressof(extension))
    assert recorder.handler(ctypes.addressof(frame)) is None
    assert (metadata.api_version.major, metadata.api_version.minor) == ffi_abi.API_VERSION
    assert metadata.traits == ffi_abi.COMMAND_BUFFER_COMPATIBLE


def test_the_table_grows_under_concurrent_readers(recorder):
    recorder.formats = []
    specs = [_spec(scale=1000.0 + i) for i in range(200)]
    for spec in specs:
        recorder.plans[spec.key] = FlatPlan(Plan((), 0), (), spec, DEVICE)

    failures = []

    def reader(order):
        failures.extend(spec for spec in order if recorder.run(spec, [], []) is not None)

    threads = [threading.Thread(target=reader, args=(specs[i:] + specs[:i],)) for i in (0, 50, 100, 150)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {spec.key for spec in specs} <= {spec.key for spec in recorder.prepared}
    recorder.prepared.clear()
    reader(specs)
    assert recorder.prepared == []


def test_a_misaligned_operand_is_refused():
    plan = Plan((Launch(KernelSpec("kernel", (), "sm_90a"), (1, 1, 1), (1, 1, 1), 0, (Operand(1, alignment=32),)),), 0)
    with pytest.raises(NotImplementedError, match="k starts 16 bytes into the packed array"):
        FlatPlan(plan, (1,), _spec(), DEVICE)


@pytest.mark.parametrize("config", [None, Config("general", (("tile", 8),))])
def test_spec_survives_its_text(config):
    spec = _spec(scale=1 / 3, config=config)
    parsed = Spec.parse(spec.text)
    assert parsed == spec
    assert parsed.key == spec.key != _spec(scale=0.33, config=config).key
