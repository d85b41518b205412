"""The core of the framework; see docs/architecture.md."""

import logging

# diffusers imports these where they are installed, used or not. bitsandbytes then warns of CPU
# kernels on the hub, which it would fetch and run, and torchao of each CUDA extension that is not
# for this torch. What a run asks of them is checked by flux2/quantise.py.
for _name in (
    "torchao",
    "bitsandbytes",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
):
    logging.getLogger(_name).setLevel(logging.ERROR)
