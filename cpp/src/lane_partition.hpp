// How the scans that carry their states in double cut their rows into tiles of lanes.
#ifndef SUBQUAD_LANE_PARTITION_HPP
#define SUBQUAD_LANE_PARTITION_HPP

#include <algorithm>
#include <cstdint>

#include "arguments.hpp"
#include "kernels/lane_tile.hpp"

namespace subquad {

// Rows are lanes; where there are too few of them to fill a tile, pieces of rows are. A function of
// the shapes alone, so that results do not depend on the number of threads.
struct lane_partition {
  std::int64_t rows;
  std::int64_t n;
  std::int64_t pieces;  // of each row
  std::int64_t length;  // of a piece; the last may be shorter
  std::int64_t lanes;
  std::int64_t tiles;

  lane_partition(std::int64_t row_count, std::int64_t row_length)
      : rows(row_count), n(row_length), pieces(1), length(row_length) {
    if (rows > 0 && rows < kTileLanes && n > kBlockSteps) {
      // Pieces are passed twice, which must not take longer than the idle lanes do. Beyond 2048
      // steps a tile only grows; below 64 what a piece costs by itself shows.
      const std::int64_t piece =
          std::clamp<std::int64_t>(divide_up(divide_up(rows * n, kTileLanes), 16) * 16, 64, 2048);
      const std::int64_t count = divide_up(n, piece);
      const bool pays = 2 * piece * divide_up(rows * count, kTileLanes) <= n;
      if (pays || n >= (1 << 14)) {
        pieces = count;
        length = piece;
      }
    }
    lanes = rows * pieces;
    tiles = divide_up(lanes, kTileLanes);
  }

  bool is_cut() const { return pieces > 1; }

  lane_tile tile(std::int64_t index) const {
    lane_tile tile{};
    tile.row_length = n;
    tile.steps = length;
    tile.count = static_cast<int>(std::min<std::int64_t>(kTileLanes, lanes - index * kTileLanes));
    for (int c = 0; c < tile.count; ++c) {
      const std::int64_t lane = index * kTileLanes + c;
      tile.positions[c] = is_cut() ? lane % pieces * length : 0;
      tile.lengths[c] = std::min(length, n - tile.positions[c]);
    }
    return tile;
  }

  // Where the lanes of a tile start in an array whose dimensions before its last `core` ones
  // (1: the axis of the scan, 0: a number for every row) are the rows.
  void offsets(const array_view& array, std::int32_t core, std::int64_t index,
               std::int64_t* offsets) const {
    const std::int32_t rank = array.ndim - core;
    const std::int64_t first = index * kTileLanes;
    const std::int64_t count = std::min<std::int64_t>(kTileLanes, lanes - first);
    std::int64_t at[kMaxDimensions];
    std::int64_t offset = 0;
    std::int64_t row = first / pieces;
    for (std::int32_t i = rank - 1; i >= 0; --i) {
      at[i] = row % array.shape[i];
      row /= array.shape[i];
      offset += at[i] * array.strides[i];
    }
    std::int64_t piece = first % pieces;
    const std::int64_t step = core > 0 ? length * array.strides[array.ndim - 1] : 0;
    for (std::int64_t c = 0; c < kTileLanes; ++c) offsets[c] = 0;
    for (std::int64_t c = 0; c < count; ++c) {
      offsets[c] = offset + piece * step;
      if (++piece < pieces) continue;
      piece = 0;
      for (std::int32_t i = rank - 1; i >= 0; --i) {
        offset += array.strides[i];
        if (++at[i] < array.shape[i]) break;
        offset -= at[i] * array.strides[i];
        at[i] = 0;
      }
    }
  }

  template <class T>
  lane_view<T> view(const array_view& array, std::int64_t index) const {
    lane_view<T> view{static_cast<T*>(array.data), array.strides[array.ndim - 1], {}};
    offsets(array, 1, index, view.offsets);
    return view;
  }

  template <class T>
  lane_view<T> view(const array_view* array, std::int64_t index) const {
    return array != nullptr ? view<T>(*array, index) : lane_view<T>{};
  }

  // Multiply-adds that take as long as `passes` over all elements: one takes about 2 ns.
  double work(int passes) const {
    return 100.0 * passes * static_cast<double>(rows) * static_cast<double>(n);
  }
};

// Rows of a scan_view.
inline std::int64_t row_count(const array_view& array) {
  std::int64_t count = 1;
  for (std::int32_t i = 0; i + 1 < array.ndim; ++i) count *= array.shape[i];
  return count;
}

}  // namespace subquad

#endif  // SUBQUAD_LANE_PARTITION_HPP
