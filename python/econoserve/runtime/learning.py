"""What the scheduler learns of response lengths: a request's features, its prediction, the file.

Owns the predictor and its file. It learns from responses in the order in which they end, which is
the same on every tensor-parallel rank.
"""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req

from econoserve.config import RuntimeConfig
from econoserve.core.lengths import LengthPrediction
from econoserve.prediction.guard import Guarded
from econoserve.prediction.predictor import State
from econoserve.prediction.registry import make_predictor
from econoserve.prediction.request import RequestFeatures, fingerprint
from econoserve.prediction.saving import load, save
from econoserve.slo import expected_tokens_of, user_of

logger = logging.getLogger(__name__)

BUSY_PERIOD_S = 60.0
"""Time between two writes of the file while requests are served."""

IDLE_PERIOD_S = 10.0
"""And while nothing is going on."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a scheduler stands among those of its server.

    Attributes:
        replica: its number; ``None`` where there is one replica.
        writes: whether it writes the file: one rank of a replica does.
        longest_tokens: of a prompt and its response together.
        adapter_of: the name of a request's LoRA adapter, empty without one.
        agree: makes what the writing rank of a replica gives the answer on all of them, so that
            they begin with the same file.
    """

    replica: int | None = None
    writes: bool = True
    longest_tokens: int = 1 << 30
    adapter_of: Callable[[Req], str] = lambda req: ""
    agree: Callable[[bytes | None], bytes | None] = lambda content: content


def state_path(config: RuntimeConfig, replica: int | None) -> Path | None:
    """The file that a replica's predictor is kept in.

    Args:
        config: the settings.
        replica: its number; ``None`` where there is one replica.

    Returns:
        The path, with the replica's number at its end; ``None`` if nothing is to be kept.
    """
    if config.predictor_state is None:
        return None
    suffix = "" if replica is None else f".{replica}"
    return Path(config.predictor_state + suffix)


def check_state(config: RuntimeConfig, replicas: int) -> None:
    """Refuse a file of a predictor's state that cannot be used, before anything is started.

    Args:
        config: the settings.
        replicas: of the server.

    Raises:
        ValueError: a file is broken or another predictor's, or there is no folder for it.
    """
    for replica in range(replicas):
        path = state_path(config, replica if replicas > 1 else None)
        if path is None:
            return
        flag = f"--econoserve-predictor-state={config.predictor_state!r}"
        if not os.access(path.parent, os.W_OK) or not path.parent.is_dir():
            raise ValueError(
                f"{flag}: {str(path.parent)!r} is no folder that can be written: make it, or name "
                "another file"
            )
        try:
            _restored(config, path, _content_of(path))
        except OSError as error:
            raise ValueError(f"{flag} cannot be read ({error}): name another file") from error


class Learner:
    """The predictor of one scheduler process.

    Args:
        config: the settings.
        place: of this process.

    Raises:
        ValueError: the file of its state cannot be used.
    """

    def __init__(self, config: RuntimeConfig, place: Place | None = None) -> None:
        self._config = config
        self.place = place or Place()
        self._path = state_path(config, self.place.replica)
        content = _content_of(self._path) if self.place.writes else None
        content = self.place.agree(content)
        self.predictor = _restored(config, self._path, content)
        if content is not None:
            logger.info("The predictor %s goes on from %s", config.predictor, self._path)
        self._news = 0
        self._saved_s: float | None = None
        self._writer: threading.Thread | None = None

    def features(self, req: Req) -> RequestFeatures:
        """What a predictor may know of a request.

        Args:
            req: the request, on arrival.

        Returns:
            Its features.

        Raises:
            ValueError: a field of ``custom_params`` is wrong.
        """
        params, cap_tokens = req.sampling_params, req.sampling_params.max_new_tokens
        # Upstream puts the room that is left in place of a limit that is missing.
        room_tokens = self.place.longest_tokens - len(req.origin_input_ids) - 1
        return RequestFeatures.of_prompt(
            req.origin_input_ids,
            cap_tokens,
            limit_tokens=0 if cap_tokens >= room_tokens else cap_tokens,
            user=fingerprint(user_of(params.custom_params)),
            model=fingerprint(self.place.adapter_of(req)),
            constraint=fingerprint(_constraint_of(req)),
            expected_tokens=expected_tokens_of(params.custom_params),
        )

    def predict(self, features: RequestFeatures) -> LengthPrediction:
        """Predict a response's length.

        Args:
            features: of the request.

        Returns:
            Its distribution.
        """
        return self.predictor.predict(features)

    def learn(self, req: Req, features: RequestFeatures) -> None:
        """Learn from a response that is complete.

        Aborts say nothing, nor do requests for one token, such as SGLang's health checks.

        Args:
            req: a finished request.
            features: as they were on its arrival.
        """
        if isinstance(req.finished_reason, FINISH_ABORT) or req.sampling_params.max_new_tokens <= 1:
            self.forget(features)
            return
        ended = not isinstance(req.finished_reason, FINISH_LENGTH)
        self.predictor.observe(features, max(len(req.output_ids_through_stop), 1), ended)
        self._news += 1

    def forget(self, features: RequestFeatures) -> None:
        """Wait no longer for a request's response.

        Args:
            features: the request's.
        """
        self.predictor.forget(features)

    def keep(self, now_s: float, period_s: float) -> None:
        """Write the file if something was learned and the last write is long enough ago.

        Another thread writes, so that requests do not wait for it.

        Args:
            now_s: the time.
            period_s: between two writes.
        """
        if self._path is None or not self.place.writes or not self._news:
            return
        if self._saved_s is None:
            self._saved_s = now_s
        is_writing = self._writer is not None and self._writer.is_alive()
        if now_s - self._saved_s < period_s or is_writing:
            return
        self._saved_s, self._news = now_s, 0
        try:
            state = self.predictor.state()
        except Exception as error:
            logger.error("What the predictor has learned cannot be kept: %r", error)
            return
        self._writer = threading.Thread(target=self._write, args=(state,), daemon=True)
        self._writer.start()

    def _write(self, state: State) -> None:
        try:
            save(state, self._config.predictor, self._path)
        except OSError as error:
            logger.error("What the predictor has learned cannot be kept: %s", error)


def _content_of(path: Path | None) -> bytes | None:
    return path.read_bytes() if path is not None and path.exists() else None


def _restored(config: RuntimeConfig, path: Path | None, content: bytes | None) -> Guarded:
    predictor = make_predictor(config.predictor, config.rl_quantile, config.rl_prior)
    if path is not None and content is not None:
        load(predictor, config.predictor, content, path)
    return predictor


def _constraint_of(req: Req) -> str:
    """What else than the prompt forms the output, in words; empty where nothing does."""
    params = req.sampling_params
    parts = (
        params.stop_strs,
        params.stop_regex_strs,
        sorted(params.stop_token_ids or ()),
        params.regex,
        params.json_schema,
        params.ebnf,
        params.structural_tag,
        params.min_new_tokens,
        params.ignore_eos,
    )
    return repr(parts) if any(parts) else ""
