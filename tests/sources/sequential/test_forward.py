"""The numpy forward beside the model that it is the twin of."""

import numpy as np
import pytest
import torch

from fusionrec.sources.sequential.config import SASRecConfig
from fusionrec.sources.sequential.forward import Forward
from fusionrec.sources.sequential.model import SequentialModel

NUM_ITEMS = 30


@pytest.mark.parametrize("block", ["sasrec", "ligr"])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_it_is_what_torch_computes(block, num_blocks):
    config = SASRecConfig(width=24, num_heads=3, num_blocks=num_blocks, block=block, max_length=9)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = SequentialModel(config, NUM_ITEMS, None).eval()
        for parameter in model.parameters():  # biases and distances too, which begin as zeros
            torch.nn.init.normal_(parameter, std=0.3)
        codes = torch.randint(NUM_ITEMS, (4, 9))
    with torch.no_grad():
        expected = model(codes).numpy()
        items = model.items(codes).numpy()
    forward = Forward.of({name: value.numpy() for name, value in model.state_dict().items()})
    assert forward.max_length == 9
    for row in range(4):
        for length in (1, 2, 9):
            found = forward(items[row, :length])
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected[row, length - 1], rtol=1e-4, atol=1e-4)
