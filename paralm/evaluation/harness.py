"""The model as a model of `lm_eval <https://pypi.org/project/lm-eval>`_, under the name ``paralm``.

lm_eval finds models by name only after they were imported, and has no option to import one. So its own command line,
with every option it has, is

    python -m paralm.evaluation.lm_eval_cli run --model paralm --model_args run=runs/NAME --tasks TASKS …

and in Python ``import paralm.evaluation.harness`` before ``lm_eval.simple_evaluate(model="paralm", …)``.
Give it ``--batch_size 16`` or so: its own default is 1. ``paralm eval lm-eval RUN tasks=[…]`` runs it with a run's own
bookkeeping.

What is counted: lm_eval's ``bits_per_byte`` of a rolling task divides the text's log-likelihood by its UTF-8 bytes, as
:mod:`paralm.evaluation.perplexity` does, but an end of the document is not in it; ``score_eos=True`` adds it, and then
the two are the same number. Its ``word_perplexity`` counts the parts that ``re.split(r"\\s+")`` gives, which are one
more for white space at either end of a text than the words ``str.split`` finds.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lm_eval import utils as lm_eval_utils
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paralm.batching import Batch, Stream, StreamText
from paralm.errors import ConfigError, UserError
from paralm.evaluation.likelihood import (
    Likelihood,
    continuation_likelihoods,
    encode_pair,
    text_likelihoods,
)
from paralm.evaluation.scoring import evaluating
from paralm.generation import stop_ids_of

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from paralm_data import Tokenizer

    from paralm.models import LanguageModel

NAME = "paralm"
_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
_GENERATION_KEYS = {"do_sample", "until", "max_gen_toks", "temperature", "top_k", "top_p"}
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}  # nothing to do at these values


class HarnessOptions(BaseModel):
    """What ``--model_args`` may say beside ``run``."""

    model_config = ConfigDict(extra="forbid")

    batch_size: int | Literal["auto"] | None = Field(None, description="Sequences side by side; default: 16.")
    max_batch_size: int | None = Field(None, ge=1, description="lm_eval's bound for batch_size=auto; not needed here.")
    chunk: int = Field(512, ge=1, description="Tokens of each sequence read at a time.")
    reset_every: int | None = Field(
        None, ge=1, description="Rolling tasks: forget after every so many tokens, as paralm's perplexity does."
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="Read no more tokens than this at once: rolling tasks in lm_eval's own windows, contexts cut from "
        "the left. For comparison with models that have a window; default: everything is read.",
    )
    score_eos: bool = Field(False, description="Rolling tasks: count the end of the document too.")
    max_gen_toks: int = Field(256, ge=0, description="Where a task does not say how many tokens to generate.")
    seed: int = Field(0, ge=0, description="Of sampled generation.")

    @property
    def rows(self) -> int:
        """Sequences side by side."""
        return self.batch_size if isinstance(self.batch_size, int) else 16


@register_model(NAME)
class ParalmLM(LM):
    """See the module. ``run``: ``RUN``, ``RUN@STEP`` or an export's folder; further keys: :class:`HarnessOptions`.

    ``dtype``: fp32, fp64 or bf16; default: the run's precision. :meth:`of` takes a model that is there already.
    Raises UserError, one line.
    """

    def __init__(
        self, run: str | Path | None = None, device: str | None = None, dtype: str | None = None, **options: Any
    ) -> None:
        from paralm.training.load import load_model

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "lm_eval on several ranks: each rank would do all the work; 'paralm eval lm-eval' shares the tasks"
            )
        self._options = _checked(options)
        if run is None:
            raise ConfigError("model_args: run is missing; give run=runs/NAME, RUN@STEP or an export's folder")
        if dtype is not None and dtype not in _DTYPES:
            raise ConfigError(f"model_args: dtype is {dtype!r}; give one of: {', '.join(_DTYPES)}")
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # lm_eval's command line says cuda:0 where nobody said anything
        loaded = load_model(str(run), device=device, dtype=_DTYPES[dtype] if dtype is not None else None)
        self._set(loaded.model, loaded.tokenizer, f"{loaded.run_dir}@{loaded.step}")

    @classmethod
    def of(cls, model: LanguageModel, tokenizer: Tokenizer, name: str = NAME, **options: Any) -> ParalmLM:
        """Around a model that is loaded; options as :class:`HarnessOptions`."""
        made = cls.__new__(cls)
        made._options = _checked(options)
        made._set(model, tokenizer, name)
        return made

    def _set(self, model: LanguageModel, tokenizer: Tokenizer, name: str) -> None:
        super().__init__()
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self._device = model.head_weight.device

    @property
    def tokenizer_name(self) -> str:
        """Fingerprint for lm_eval's request cache."""
        return self.tokenizer.sha256

    def get_model_info(self) -> dict[str, Any]:
        """For lm_eval's results file."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.head_weight.dtype),
            "model_name": self.name,
        }

    # -- likelihoods -----------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(Σ ln p, all greedy) of each request's continuation after its context; a context is read once."""
        pairs = [encode_pair(self.tokenizer, *request.args) for request in requests]
        if self._options.max_length is not None:
            pairs = [_cut(*pair, self._options.max_length) for pair in pairs]
        found = self._pairs(pairs)
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, tuple(one))
        return [(one.logprob, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Σ ln p of each whole text, read from BOS on with the state carried: no windows unless asked for."""
        options, tokenizer = self._options, self.tokenizer
        texts = tokenizer.encode_batch([request.args[0] for request in requests])
        if options.score_eos:
            texts = [[*ids, tokenizer.eos_id] for ids in texts]
        if options.max_length is not None:
            found = self._windows(texts, options.max_length)
        else:
            found = text_likelihoods(
                self.model,
                [[tokenizer.bos_id, *ids] for ids in texts],
                rows=options.rows,
                chunk=options.chunk,
                reset_every=options.reset_every,
            )
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def _windows(self, texts: Sequence[list[int]], length: int) -> list[float]:
        """In lm_eval's windows: each but the last as :mod:`paralm.evaluation.stream` cuts them with ``reset_every``;
        the last one reaches back so that it is as long as the others, and only its new tokens are scored."""
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for index, ids in enumerate(texts):
            windows = lm_eval_utils.get_rolling_token_windows(ids, self.tokenizer.bos_id, length, 1)
            own = [lm_eval_utils.make_disjoint_window(window) for window in windows]
            pairs += own
            owners += [index] * len(own)
        found = [0.0] * len(texts)
        for index, one in zip(owners, self._pairs(pairs), strict=True):
            found[index] += one.logprob
        return found

    def _pairs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        return continuation_likelihoods(self.model, pairs, rows=self._options.rows, chunk=self._options.chunk)

    # -- generation ------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text that continues each context, up to the first of its stop strings or the end of the document.

        Greedy unless a task asks for sampling; then every request has a seed of its own, made from the option
        ``seed``, the context, and how often the same request came before, so that neither the order of requests nor
        their neighbours matter.
        """
        seen: dict[str, int] = {}
        texts: list[StreamText] = []
        for request in requests:
            context, given = request.args
            count = seen[context] = seen.get(context, -1) + 1
            texts.append(self._stream(context, given, f"{self._options.seed}/{count}/{context}"))
        by_stream = {text.stream: text for text in texts}
        batch = Batch(self.model, rows=self._options.rows, chunk=self._options.chunk)
        for stream in sorted(by_stream, key=lambda s: -len(s.prompt)):  # those of about equal length are read together
            batch.add(stream)
        with evaluating(self.model):
            while len(batch):
                for stream in batch.step():
                    by_stream[stream].take()
                    if stream.error is not None:
                        raise stream.error
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text.text)
        return [text.text for text in texts]

    def _stream(self, context: str, given: dict[str, Any], seed: str) -> StreamText:
        keys: dict[str, Any] = dict(normalize_gen_kwargs(given, self._options.max_gen_toks))
        unknown = [k for k, v in keys.items() if k not in _GENERATION_KEYS and not (k in _NEUTRAL and v == _NEUTRAL[k])]
        if unknown:
            raise UserError(
                f"generation_kwargs: {unknown[0]}={keys[unknown[0]]!r} is not supported; "
                f"supported: {', '.join(sorted(_GENERATION_KEYS))}"
            )
        prompt = [self.tokenizer.bos_id, *self.tokenizer.encode(context)]
        if self._options.max_length is not None:
            prompt = prompt[-max(1, self._options.max_length - keys["max_gen_toks"]) :]
        stream = Stream(
            prompt,
            keys["max_gen_toks"],
            # lm_eval: without do_sample, or at a temperature of 0, the likeliest token always
            temperature=float(keys.get("temperature", 1.0)) if keys["do_sample"] else 0.0,
            top_k=int(keys.get("top_k") or 0),
            top_p=float(keys.get("top_p") or 1.0),
            seed=int.from_bytes(hashlib.sha256(seed.encode("utf-8", "surrogatepass")).digest()[:7], "big"),
            stop_ids=stop_ids_of(self.tokenizer),
            vocab_size=self.tokenizer.vocab_size,
        )
        return StreamText(stream, self.tokenizer, [s for s in keys["until"] if s])


def _cut(context: Sequence[int], continuation: Sequence[int], length: int) -> tuple[list[int], list[int]]:
    """At most ``length`` tokens read: from the context's left, then from the continuation's, as lm_eval does."""
    both = [*context, *continuation][-(length + 1) :]
    count = min(len(continuation), len(both) - 1)
    return both[: len(both) - count], both[len(both) - count :]


def _checked(options: dict[str, Any]) -> HarnessOptions:
    try:
        return HarnessOptions.model_validate(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = first["loc"][0] if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            valid = ["run", "device", "dtype", *HarnessOptions.model_fields]
            raise ConfigError(f"model_args: no such key '{key}' (valid: {', '.join(valid)})") from None
        raise ConfigError(f"model_args: {key}: {first['msg']}, got {first['input']!r}") from None
