// The backward kernels of fp32 and head sizes up to 256.
#include "thought_attention_backward.cuh"

namespace quietstar::cuda::attention {

template void launch_backward<float, 256>(const Arguments&, const Device&);

}  // namespace quietstar::cuda::attention
