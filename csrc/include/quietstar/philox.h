// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), for CPU
// and CUDA alike. A counter-based generator has no state: row n of a batch gets the same number
// whatever thread or chunk computes it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define QUIETSTAR_HOST_DEVICE __host__ __device__
#else
#define QUIETSTAR_HOST_DEVICE
#endif

namespace quietstar {

struct PhiloxBlock {
  std::uint32_t word[4];
};

// The four output words for a 64-bit key and the 128-bit counter (counter, 0).
QUIETSTAR_HOST_DEVICE static inline PhiloxBlock philox4x32(std::uint64_t key,
                                                           std::uint64_t counter) {
  std::uint32_t k0 = static_cast<std::uint32_t>(key);
  std::uint32_t k1 = static_cast<std::uint32_t>(key >> 32);
  PhiloxBlock c{
      {static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32), 0u, 0u}};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * c.word[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * c.word[2];
    c = PhiloxBlock{
        {static_cast<std::uint32_t>(b >> 32) ^ c.word[1] ^ k0, static_cast<std::uint32_t>(b),
         static_cast<std::uint32_t>(a >> 32) ^ c.word[3] ^ k1, static_cast<std::uint32_t>(a)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// A number in [0, 1) with 53 random bits: the upper bits of the first two words, word 1 above word
// 0.
QUIETSTAR_HOST_DEVICE static inline double philox_uniform(std::uint64_t key,
                                                          std::uint64_t counter) {
  const PhiloxBlock block = philox4x32(key, counter);
  const std::uint64_t both = (std::uint64_t{block.word[1]} << 32) | block.word[0];
  return static_cast<double>(both >> 11) * 0x1p-53;
}

}  // namespace quietstar
