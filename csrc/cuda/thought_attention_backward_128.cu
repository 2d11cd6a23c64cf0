// The backward kernels of 16-bit elements and head sizes up to 128.
#include "thought_attention_backward.cuh"

namespace quietstar::cuda::attention {

template void launch_backward<BFloat16, 128>(const Arguments&, const Device&);
template void launch_backward<Float16, 128>(const Arguments&, const Device&);

}  // namespace quietstar::cuda::attention
