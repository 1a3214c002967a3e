from __future__ import annotations

import pytest

from actors.kernels.compiler import KernelUnavailable
from actors.kernels.cpu import CpuKernels, load_cpu_kernels


@pytest.fixture(scope="session")
def kernels() -> CpuKernels:
    try:
        return load_cpu_kernels()
    except KernelUnavailable as error:
        pytest.skip(str(error))
