// What the CUDA runtime in this build and the driver of this machine are. Starts nothing on a device.
#include <cuda_runtime_api.h>

#include "pyarith/ops.h"

namespace pyarith::cuda {

Versions versions() {
    Versions found{0, 0};
    cudaDriverGetVersion(&found.driver);
    cudaRuntimeGetVersion(&found.runtime);
    return found;
}

}  // namespace pyarith::cuda
