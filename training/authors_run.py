"""A checkpoint of the authors as a run: their weights, their vocabulary, their way of cutting captions and photographs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dualmatch.models import DSRAN, VSRN
from dualmatch.models.authors import AuthorsCheckpoint, network_from_authors, read_checkpoint
from dualmatch.models.authors_files import read_vocabulary
from dualmatch.models.config import TextConfig, TrunkConfig
from dualmatch.models.trunks import preprocess_of
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_file
from dualmatch.runtime.tokenizer import CaptionTokenizer

from .authors_data import bert_tokenizer, read_pieces
from .checkpoint import Run, text_options
from .recipe import ForeignRecipe
from .treebank import punkt_abbreviations, treebank_tokenizer
from .vocabulary import save_tokenizer

# The authors evaluate on the central 224 x 224 of a photograph whatever their option crop_size, which is training's, says.
CROP_SIZE = 224


def run_from_authors(path: Path, vocabulary: Path, scratch: Path, *, one_sentence: bool = False) -> Run:
    """Open a `*.pth.tar` of DSRAN or VSRN, without executing anything in it.

    Args:
        vocabulary: the pickle that the checkpoint was trained with; for DSRAN-BERT the vocab.txt of its BERT.
        scratch: a folder that the run's tokenizer.json is written to.
        one_sentence: words are cut as if every caption were one sentence, for want of Punkt's data; see `treebank_tokenizer`.

    Raises:
        DualmatchError: a file cannot be read, vocabulary and checkpoint do not belong together, or the network cannot be served.
    """
    checkpoint = read_checkpoint(path)
    model = network_from_authors(checkpoint, source=str(path))
    _check_servable(model, path)
    text = model.config.text
    tokenizer, size, sentences = _tokenizer(text, vocabulary, one_sentence=one_sentence)
    if size != text.vocabulary_size:
        raise DualmatchError(
            f"the vocabulary {vocabulary} holds {size} entries, {path} was trained with {text.vocabulary_size}; "
            "take the one of the checkpoint's own repository and data set."
        )
    save_tokenizer(tokenizer, scratch / "tokenizer.json")
    trunk = model.config.trunk if isinstance(model, DSRAN) else TrunkConfig(name="none")
    return Run(
        folder=scratch,
        recipe=ForeignRecipe(name=path.name.removesuffix(".pth.tar"), description=_description(model)),
        model=model,
        preprocess=preprocess_of(replace(trunk, image_size=CROP_SIZE), "crop"),
        tokenizer=CaptionTokenizer(scratch / "tokenizer.json", text_options(text)),
        data="",
        # VSRN's authors choose by R@1 + R@5, which is no Rsum.
        facts={"epoch": checkpoint.epoch, "val_rsum": checkpoint.best_rsum if isinstance(model, DSRAN) else None},
        checkpoint_hash=sha256_of_file(path),
        caption_batch=_batch_size(checkpoint, path),
        provenance={"vocabulary_sha256": sha256_of_file(vocabulary), **sentences},
    )


def _check_servable(model: DSRAN | VSRN, path: Path) -> None:
    if isinstance(model, DSRAN):
        if model.image_encoder.trunk is None:
            raise DualmatchError(
                f"{path} holds no ResNet-152 (img_enc.cnn.*), which the global path needs; the authors' own checkpoints hold it."
            )
    elif model.config.measure != "cosine" or not model.config.normalise_images:
        raise DualmatchError(
            f"{path} compares embeddings by the order measure, or without unit norm; a bundle serves unit vectors that are "
            "compared by their product. In Python `dualmatch.models.from_authors` reads it."
        )


def _tokenizer(text: TextConfig, vocabulary: Path, *, one_sentence: bool) -> tuple[Tokenizer, int, dict[str, Any]]:
    """The tokenizer, the vocabulary's entries, and what the manifest should say of how sentences were told."""
    if text.encoder == "bert":
        if one_sentence:
            raise DualmatchError("WordPiece knows no sentences; leave out --one-sentence.")
        pieces = read_pieces(vocabulary)
        return bert_tokenizer(pieces), len(pieces), {}
    ids = read_vocabulary(vocabulary)
    abbreviations = None if one_sentence else punkt_abbreviations()
    sentences = {"sentences": "one a caption" if one_sentence else "Punkt"}
    return treebank_tokenizer(ids, abbreviations=abbreviations), len(ids), sentences


def _batch_size(checkpoint: AuthorsCheckpoint, path: Path) -> int:
    size = checkpoint.opt.get("batch_size")
    if type(size) is not int or not 1 <= size <= 65536:
        raise DualmatchError(
            f"{path} says batch_size = {size!r}; the number of captions that its authors pad together is needed."
        )
    return size


def _description(model: DSRAN | VSRN) -> str:
    if isinstance(model, VSRN):
        return f"A VSRN with {model.config.num_relation_layers} relation layers, trained by its authors' code."
    text = "BERT" if model.config.text.encoder == "bert" else "a GRU"
    return f"A DSRAN with {text} and K = {model.config.joint_graphs}, trained by its authors' code."
