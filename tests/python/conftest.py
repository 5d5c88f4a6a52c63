import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Runs a test on the CPU and, where there is one, on a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _afresh():
    """Torch's generator and its compiler, which compiles one code for so many models at most."""
    torch.compiler.reset()
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Models and tensors as small as a test's gain nothing by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
