#include "select.h"

#include <algorithm>
#include <functional>

namespace quietstar {

float kth_largest(float* values, std::int64_t count, std::int64_t k) {
  std::nth_element(values, values + (k - 1), values + count, std::greater<float>());
  return values[k - 1];
}

void sort_descending(float* values, std::int64_t count) {
  std::sort(values, values + count, std::greater<float>());
}

}  // namespace quietstar
