"""A Job: what a training step is, as factories. For the commands that take a TARGET.

dpmem find-batch-size examples/gpt_job.py:plain --budget 512MiB
dpmem find-batch-size examples/gpt_job.py:compressed --budget 512MiB
dpmem report examples/gpt_job.py:compressed --batch 8
"""

from dataclasses import replace
from functools import partial

import torch

import dpmem
from dpmem.text_gpt import ByteGPT, StandardLibraryText, next_byte_loss


def plain() -> dpmem.Job:
    """The byte-level GPT as torch trains it."""
    return dpmem.Job(
        model=ByteGPT,
        batch=StandardLibraryText(context=256).batch,
        loss=next_byte_loss,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        name="byte-level GPT, plain",
    )


def compressed() -> dpmem.Job:
    """The same, through `dpmem.wrap` with 4-bit activations."""
    wrap = partial(dpmem.wrap, activations="4bit", max_grad_norm=1.0)
    return replace(plain(), wrap=wrap, name="byte-level GPT, 4-bit activations")
