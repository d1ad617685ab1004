// Calls of the operators from Python that skip torch.ops.
#pragma once

#include <pybind11/pybind11.h>

namespace frozen_bn {

// Gives `module` the function `calling(name, slow)`.
void define_calls(pybind11::module_& module);

}  // namespace frozen_bn
