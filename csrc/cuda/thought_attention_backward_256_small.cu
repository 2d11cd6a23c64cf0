// The same in the shared memory of a graphics card.
#include "thought_attention_backward.cuh"

namespace quietstar::cuda::attention {

template void launch_backward<BFloat16, 256, true>(const Arguments&, const Device&);
template void launch_backward<Float16, 256, true>(const Arguments&, const Device&);

}  // namespace quietstar::cuda::attention
