// How the scans along one axis see their arrays: lanes, a tile of which is worked on side by side.
#ifndef SUBQUAD_KERNELS_LANE_TILE_HPP
#define SUBQUAD_KERNELS_LANE_TILE_HPP

#include <cstdint>

namespace subquad {

// Lanes of a tile, at every level: what is cut, and hence every result, does not depend on how many
// of them fit into a vector.
constexpr int kTileLanes = 16;

// Steps between two visits to memory, and between two saved states.
constexpr std::int64_t kBlockSteps = 128;

// Numbers that a tile keeps for every lane: component k of lane c is element [k][c].
using lane_numbers = double[kTileLanes];

// Step t of lane c is data[offsets[c] + t * stride]; data may be null where the array is optional.
template <class T>
struct lane_view {
  T* data;
  std::int64_t stride;
  std::int64_t offsets[kTileLanes];
};

// A lane is a row, or a piece of one.
struct lane_tile {
  std::int64_t row_length;
  std::int64_t steps;                  // of the longest lane
  int count;                           // lanes in use
  std::int64_t lengths[kTileLanes];    // steps of each lane, 0 where it is not in use
  std::int64_t positions[kTileLanes];  // of each lane's first step in its row
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_LANE_TILE_HPP
