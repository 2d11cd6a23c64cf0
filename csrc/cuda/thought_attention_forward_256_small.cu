// The same in the shared memory of a graphics card.
#include "thought_attention_forward.cuh"

namespace quietstar::cuda::attention {

template void launch_forward<BFloat16, 256, true>(const Arguments&, const Device&);
template void launch_forward<Float16, 256, true>(const Arguments&, const Device&);

}  // namespace quietstar::cuda::attention
