"""A run that pads captions in another way than it was trained with, and remembers how it was, so that the cost can be measured."""

from dataclasses import replace

from dualmatch.models import DSRAN
from dualmatch.models.config import PadPolicy
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.tokenizer import CaptionTokenizer

from .checkpoint import Run, text_options


def with_padding(run: Run, *, pad_policy: PadPolicy | None = None, fixed_length: int | None = None) -> Run:
    """`run` with other padding and the same weights; its `reference` is `run`, unless nothing changes.

    Args:
        pad_policy: `masked` takes padding out of the network, `authors` counts it; None leaves it.
        fixed_length: captions are cut and padded to exactly this many tokens; None leaves the length.

    Raises:
        DualmatchError: the network has no padding to change, or cannot read captions of this length.
    """
    if pad_policy is None and fixed_length is None:
        return run
    if not isinstance(run.model, DSRAN):
        raise DualmatchError("a VSRN's captions do not depend on padding: there is no policy or length to choose.")
    config = run.model.config
    text = config.text
    if fixed_length is not None:
        text = replace(text, fixed_length=fixed_length, max_length=min(text.max_length or fixed_length, fixed_length))
    changed = replace(config, pad_policy=pad_policy or config.pad_policy, text=text)
    if changed == config:
        return run
    model = DSRAN(changed, run.model.image_encoder.trunk)
    model.load_state_dict(run.model.state_dict())
    padding = {
        "pad_policy": config.pad_policy,
        "fixed_length": config.text.fixed_length,
        "caption_batch": run.caption_batch,
    }
    return replace(
        run,
        model=model.eval(),
        tokenizer=CaptionTokenizer(run.tokenizer_path, text_options(text)),
        provenance={**run.provenance, "reference_padding": padding},
        reference=run,
    )
