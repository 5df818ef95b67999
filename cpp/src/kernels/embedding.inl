#include "embedding_kernels.hpp"

#include "tile_product.inl"

namespace subquad {
namespace SUBQUAD_ISA {

extern const embedding_kernels kernels_embedding;
const embedding_kernels kernels_embedding = {{kTileColumns<float>}, {kTileColumns<double>}};

}  // namespace SUBQUAD_ISA
}  // namespace subquad
