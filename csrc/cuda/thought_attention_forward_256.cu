// The forward kernels of 16-bit elements and head sizes up to 256.
#include "thought_attention_forward.cuh"

namespace quietstar::cuda::attention {

template void launch_forward<BFloat16, 256>(const Arguments&, const Device&);
template void launch_forward<Float16, 256>(const Arguments&, const Device&);

}  // namespace quietstar::cuda::attention
