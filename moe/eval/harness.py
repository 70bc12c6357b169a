"""A model of ours as lm-eval's harness asks it: log-likelihoods and generations for its tasks; the only file that knows
lm-eval (the extra `eval`).

Requests are packed end to end, as in training, and none sees another. A text begins as the model's tokenizer begins it.
Whole texts (`loglikelihood_rolling`) are predicted after one <|bos|>, which itself is not predicted; lm-eval's own `hf`
model predicts it where the tokenizer adds it, unless it is given add_bos_token=False.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer

import kernels
from moe.data import tokenizer as tokenizers
from moe.errors import InputError
from moe.eval.bits import TOKENS_PER_BATCH
from moe.eval.generate import generate
from moe.hf.folder import ModelFolder

Pair = tuple[Any, list[int], list[int]]  # the request, its context's tokens, its continuation's
GENERATIONS = 16  # at once
LOGITS_ROWS = 1024  # at once, of the whole vocabulary in float32
BOOTSTRAP = 1000  # draws, for the standard errors that have no formula
NEW_TOKENS = 256  # where a task does not say
MOST_SAID = 200  # letters of somebody else's error


class HarnessModel(TemplateLM):
    """`observe` is told (done, all) of the requests at hand."""

    def __init__(self, model: ModelFolder, observe: Callable[[int, int], None] = lambda done, total: None):
        super().__init__()
        self._decoder, self._observe = model.decoder, observe
        # As AutoTokenizer would: a chat template's special tokens are meant.
        self._tokenizer = Tokenizer.from_str(model.tokenizer.to_str())
        self._tokenizer.encode_special_tokens = False
        self._bos, self._eos = tokenizers.ends(model.tokenizer, model.special)
        self.max_length = model.decoder.config.context_length

    @property
    def device(self) -> torch.device:
        return self._decoder.embedding.weight.device

    @property
    def eot_token_id(self) -> int:
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        return self._bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._tokenizer.id_to_token(self._bos))
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens).ids

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        whose, windows = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self._bos, self.max_length, context_len=1):
                whose.append(number)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for number, (log_prob, _) in zip(whose, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += log_prob
        return totals

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        """Of each continuation: the sum of its tokens' log-probabilities, and whether each was the likeliest."""
        answers: list[tuple[float, bool]] = []
        for batch in _batches([self._cut(pair) for pair in requests]):
            answers += self._score(batch)
            self._observe(len(answers), len(requests))
        return answers

    def _cut(self, pair: Pair) -> tuple[list[int], list[int]]:
        """What is read and what is predicted of it; too long a context loses its beginning. Raises InputError for a
        continuation that is too long itself."""
        _, context, continuation = pair
        if len(continuation) > self.max_length:
            raise InputError(f"a task has an answer of {len(continuation)} tokens: want at most "
                             f"model.context_length={self.max_length}")
        return (context + continuation)[-(self.max_length + 1) : -1], continuation

    def _score(self, batch: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        lengths = [len(read) for read, _ in batch]
        counts = [len(continuation) for _, continuation in batch]
        documents = kernels.documents([0, *accumulate(lengths)], self.device)
        token_T = torch.tensor([token for read, _ in batch for token in read], device=self.device)
        label_N = torch.tensor([token for _, continuation in batch for token in continuation], device=self.device)
        ends = accumulate(lengths)
        row_N = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
        hidden_ND = self._decoder(token_T, documents).hidden_TD[row_N.to(self.device)]
        log_probs, likeliest = [], []
        for hidden, label in zip(hidden_ND.split(LOGITS_ROWS), label_N.split(LOGITS_ROWS), strict=True):
            logits = (hidden @ self._decoder.head_weight.T).float()
            log_probs.append(logits.gather(1, label[:, None])[:, 0] - logits.logsumexp(dim=-1))
            likeliest.append(logits.argmax(dim=-1) == label)
        both = zip(torch.cat(log_probs).double().split(counts), torch.cat(likeliest).split(counts), strict=True)
        return [(part.sum().item(), bool(best.all())) for part, best in both]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        answers: dict[int, str] = {}
        eos = self._tokenizer.decode([self._eos], skip_special_tokens=False)
        for numbers in _alike([request.args[1] for request in requests]):
            wanted = normalize_gen_kwargs(requests[numbers[0]].args[1], NEW_TOKENS)
            if wanted["max_gen_toks"] >= self.max_length:
                raise InputError(f"a task wants up to {wanted['max_gen_toks']} new tokens: want fewer than "
                                 f"model.context_length={self.max_length}")
            stops = handle_stop_sequences(list(wanted["until"]), eos)
            room = self.max_length - wanted["max_gen_toks"]
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            generator = torch.Generator().manual_seed(0)
            rows = generate(self._decoder, prompts, wanted["max_gen_toks"], eos=self._eos,
                            temperature=wanted["temperature"] if wanted["do_sample"] else 0.0, generator=generator)
            for number, row in zip(numbers, rows, strict=True):
                text = self._tokenizer.decode(row, skip_special_tokens=False)
                answers[number] = postprocess_generated_text(text, stops, None)
            self._observe(len(answers), len(requests))
        return [answers[number] for number in range(len(requests))]


def run_tasks(model: HarnessModel, tasks: Sequence[str], include: Path | None, limit: int | None,
              num_fewshot: int | None) -> dict[str, dict[str, Any]]:
    """Of each task its metrics, as lm-eval names them; a group's tasks beside the group. `tasks` are names that lm-eval
    knows, or that files in `include` have.

    Raises InputError for a task that nobody knows, or that does not run: its data are not to be had, its template is
    wrong."""
    manager = TaskManager(include_path=str(include) if include else None)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        where = f"lm-eval and {include}" if include else "lm-eval"
        raise InputError(f"task {unknown[0]} is not known to {where}: want one of `lm-eval ls tasks`, or --include "
                         "with the folder of its YAML file")
    try:
        found = evaluator.simple_evaluate(model, tasks=list(tasks), task_manager=manager, limit=limit,
                                          num_fewshot=num_fewshot, bootstrap_iters=BOOTSTRAP, log_samples=False)
    except InputError:
        raise
    except Exception as error:  # what lm-eval and datasets raise has many types
        said = next(iter(str(error).strip().splitlines()), "")[:MOST_SAID]
        raise InputError(f"tasks {', '.join(tasks)} do not run: {type(error).__name__}: {said}; want tasks whose data "
                         "can be had and whose template fits them") from error
    return {name: {metric: value for metric, value in own.items() if isinstance(value, int | float)}
            for name, own in found["results"].items()}


def _batches(pairs: list[tuple[list[int], list[int]]]) -> Iterator[list[tuple[list[int], list[int]]]]:
    """In order, of at most TOKENS_PER_BATCH tokens, or one that is longer."""
    batch: list[tuple[list[int], list[int]]] = []
    size = 0
    for pair in pairs:
        if batch and size + len(pair[0]) > TOKENS_PER_BATCH:
            yield batch
            batch, size = [], 0
        batch.append(pair)
        size += len(pair[0])
    if batch:
        yield batch


def _alike(settings: list[dict[str, Any]]) -> Iterator[list[int]]:
    """Numbers of requests that are generated in one way, so many at once."""
    groups: dict[str, list[int]] = {}
    for number, own in enumerate(settings):
        groups.setdefault(repr(sorted(own.items(), key=str)), []).append(number)
    for numbers in groups.values():
        yield from (numbers[start : start + GENERATIONS] for start in range(0, len(numbers), GENERATIONS))
