// The functions of bindings_cuda.cpp, for the two modules that have them.
#pragma once

#include <pybind11/pybind11.h>

void bind_cuda(pybind11::module_& m);
