// Threads, and the memory that a caller hands over for them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace quietstar {

// Calls work(i, thread) for every i below count, on up to so many threads.
template <class Work>
void in_parallel(std::int64_t count, std::int64_t max_threads, Work work) {
  const auto threads = static_cast<int>(std::max<std::int64_t>(1, std::min(max_threads, count)));
  std::atomic<std::int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#ifdef _OPENMP
    const int thread = omp_get_thread_num();
#else
    const int thread = 0;
#endif
    for (std::int64_t i; (i = next.fetch_add(1)) < count;) work(i, thread);
  }
}

// Lays arrays out from an address; with a null address it only measures.
class Layout {
 public:
  explicit Layout(void* begin) : begin_(static_cast<char*>(begin)) {}
  template <class T>
  void place(T*& array, std::int64_t count) {
    if (begin_) array = reinterpret_cast<T*>(begin_ + size_);
    size_ += (count * static_cast<std::int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
  }
  std::int64_t size() const { return size_; }

 private:
  static constexpr std::int64_t kAlign = 64;
  char* begin_;
  std::int64_t size_ = 0;
};

}  // namespace quietstar
