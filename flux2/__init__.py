"""The core of the framework; see docs/architecture.md."""

import logging

# diffusers imports these where they are installed, used or not, and they tell of every kernel that
# this machine lacks. What a run asks of them is checked by flux2/quantise.py.
for _name in (
    "torchao",
    "bitsandbytes",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
):
    logging.getLogger(_name).setLevel(logging.ERROR)
