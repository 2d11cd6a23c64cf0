// The forward kernels of fp32.
#include "thought_attention_forward.cuh"

namespace quietstar::cuda::attention {

template void launch_forward<float, 64>(const Arguments&, const Device&);
template void launch_forward<float, 128>(const Arguments&, const Device&);
template void launch_forward<float, 256>(const Arguments&, const Device&);

}  // namespace quietstar::cuda::attention
