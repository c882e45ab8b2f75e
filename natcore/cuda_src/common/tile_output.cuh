// What a warp gathers of its tile: O and the softmax.
#pragma once

#include "common/tiles.cuh"

// O and the softmax of a tile, before division. `sum` and `top` are of rows g and g + 8, g = lane / 4; `o` is as the
// products have it.
struct Output {
  float o[O_TILES][4] = {}, sum[4] = {};
  float top[2] = {-1e30f, -1e30f};  // finite: rows beyond the map see no key
};
