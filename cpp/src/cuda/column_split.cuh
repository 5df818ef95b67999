// How rows and the columns that are summed over are cut into blocks.
#ifndef SUBQUAD_CUDA_COLUMN_SPLIT_HPP
#define SUBQUAD_CUDA_COLUMN_SPLIT_HPP

#include <algorithm>
#include <cstdint>

#include "arguments.hpp"
#include "tile_product.cuh"

namespace subquad::cuda {

// A function of the shapes alone, so that results do not depend on the device. Columns are cut
// where rows make too few blocks for the multiprocessors of a large device (two each on 132 of
// them, twice), into parts of whole tiles. `batch` counts what else makes blocks of its own.
struct column_split {
  std::int64_t row_tiles;
  std::int64_t columns;  // of a part
  std::int64_t parts;

  column_split(std::int64_t batch, std::int64_t n, std::int64_t m, int tile_rows,
               int tile_columns) {
    constexpr std::int64_t kBlocks = 528;
    row_tiles = divide_up(n, tile_rows);
    const std::int64_t tiles = std::max<std::int64_t>(1, divide_up(m, tile_columns));
    const std::int64_t wanted = kBlocks / std::max<std::int64_t>(1, batch * row_tiles);
    const std::int64_t of_part = std::min(
        divide_up(tiles, std::clamp<std::int64_t>(wanted, 1, tiles)), kMostRows / tile_columns);
    columns = of_part * tile_columns;
    parts = divide_up(tiles, of_part);
  }
};

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_COLUMN_SPLIT_HPP
