// The backward kernels of fp32.
#include "thought_attention_backward.cuh"

namespace quietstar::cuda::attention {

template void launch_backward<float, 64>(const Arguments&, const Device&);
template void launch_backward<float, 128>(const Arguments&, const Device&);
template void launch_backward<float, 256>(const Arguments&, const Device&);

}  // namespace quietstar::cuda::attention
