// Kernels with one mistake each, and their sound twins, with which tests show that running CUDA
// sources on the CPU finds such mistakes.
#pragma once

#include <string>
#include <vector>

namespace quietstar::testing {

// Runs the kernel called `name` over 64 threads and returns what it wrote; throws
// std::invalid_argument for an unknown name. With `sound`, the twin without the mistake runs.
std::vector<float> run_fault(const std::string& name, bool sound);
std::vector<std::string> fault_names();

}  // namespace quietstar::testing
