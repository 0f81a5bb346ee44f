"""The demo model: a tiny random Llama with a tokenizer, built once in the user's cache folder.

Owns what the demo, the tests and the CPU benchmark serve when no real model is at hand: 4.5 million
float32 weights drawn from a fixed seed and a byte-level BPE tokenizer trained on the text below.
It must never download anything, and must never leave a half-built folder where a whole one is
expected. The answers are word salad; their tokens, their lengths and the time they take are real.

``python -m econoserve.demo_model`` builds it if need be and prints its path.
"""

import contextlib
import fcntl
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

VERSION = "demo-model-v1"
MARKER = "complete.json"
SEED = 20_260_101
VOCAB_SIZE = 4096
HIDDEN_SIZE = 256
CONTEXT_TOKENS = 8192

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|{{ message.role }}|>{{ message.content }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Standard deviation of each kind of weight, in units that keep its output near 1 for normed input.
# Attention logits spread this wide make the next token depend on the context, not only on the last
# token, so that greedy decoding does not fall into a loop.
_SPREAD = {
    "embed_tokens": 1.0,
    "q_proj": 1.5 / math.sqrt(HIDDEN_SIZE),
    "k_proj": 1.5 / math.sqrt(HIDDEN_SIZE),
    "v_proj": 1.0 / math.sqrt(HIDDEN_SIZE),
    "o_proj": 1.0 / math.sqrt(HIDDEN_SIZE),
    "gate_proj": 1.0 / math.sqrt(HIDDEN_SIZE),
    "up_proj": 1.0 / math.sqrt(HIDDEN_SIZE),
    "down_proj": 1.0 / math.sqrt(2 * HIDDEN_SIZE),
    "lm_head": 3.0 / math.sqrt(HIDDEN_SIZE),
}
# Column 0 of the hidden state is this constant for every token: it turns column 0 of the output
# layer into a bias per token, which Llama otherwise lacks.
_CONSTANT = 4.0
_BIAS_NEVER = -10.0
# Chosen by measurement: responses of 100 tokens on average when greedy and 140 at temperature 1,
# from one token to about 500, spread like a geometric distribution.
_EOS_SPREAD = 0.9
_EOS_BIAS = 1.5

# Texts that the tokenizer is trained on and that the demo's long prompts are built from.
PASSAGES = {
    "lighthouse": """The lighthouse at the end of the harbour wall was built in 1874, after three \
ships had been lost in a single winter. Its first keeper was a retired carpenter who had never \
been to sea. Every evening he climbed the hundred and twelve steps with a can of oil, trimmed the \
wick, wound the clockwork that turned the lens, and wrote the weather into a thick book. He wrote \
a line a day for thirty-one years. Most of the lines are short: fog until noon, wind from the \
west, nothing to report. But on some days he added what he had seen. A whale that stayed for a \
week. A boy who rowed out alone to fetch his father's hat. The night when the lamp failed and he \
stood at the window with a lantern until the sun came up, swinging it slowly from side to side, \
because a boat was still out there and he did not know whose it was.""",
    "bridge": """A bridge is an argument with gravity, and every kind of bridge makes the argument \
in its own way. A beam simply resists: its top is squeezed, its bottom is stretched, and the \
longer it becomes the more of its strength it spends on carrying itself. An arch turns the load \
sideways and hands it to the ground at both ends, which is why stone, strong when pressed and weak \
when pulled, could cross rivers two thousand years ago. A hanging bridge does the opposite. Its \
cables are only ever pulled, and steel is very good at being pulled, so it can reach farther than \
any other. What it gains in reach it pays for in stiffness: a light deck moves in the wind. \
Engineers learned this in 1940, when a new bridge twisted itself to pieces on a calm and sunny \
morning, four months after it had been opened to traffic.""",
    "bees": """When a honeybee finds a good patch of flowers she flies home and dances. She runs \
straight ahead for a few steps, shaking her body, turns back in a half circle, and runs the same \
line again. The angle between that line and the vertical is the angle between the flowers and the \
sun. The time she spends shaking tells how far to fly: about one second for each kilometre. Other \
bees follow her in the dark, touching her with their antennae, and after a few turns they leave \
and find the place. If it is as good as she promised, they come back and dance as well; if it is \
not, they say nothing. No bee compares two places, and no bee knows how many are looking. Yet \
within an hour most of the hive is working where the nectar is richest, and when the patch is \
empty the dancing stops by itself.""",
    "kitchen": """To make the soup, cut two onions, three carrots and a stick of celery into small \
pieces and cook them slowly in butter for twenty minutes. Do not let them brown. Add a spoon of \
tomato paste, a bay leaf, half a teaspoon of pepper and 200 grams of red lentils that have been \
washed until the water runs clear. Pour in a litre and a half of stock, bring it to the boil, and \
let it cook gently for half an hour with the lid half on. Stir now and then, because lentils like \
to stick to the bottom. When they have fallen apart, take out the leaf, add the juice of one lemon \
and as much salt as it needs, and blend half of the soup so that the rest keeps some bite. It \
serves four, costs very little, and is better on the second day.""",
    "meeting": """Notes of the meeting on Tuesday. Present: Anna, Bilal, Chen, Dora. The new \
billing service went live on Friday at 18:00 and was rolled back at 21:30, because about two \
percent of the invoices were sent twice. Chen found the cause: the queue delivers a message again \
when the answer takes longer than thirty seconds, and the service did not check whether it had \
seen the message before. Bilal has a fix with a test and wants to release it on Thursday. Anna \
asked that the customers who were charged twice are told before they notice it themselves; Dora \
writes to them today and the money goes back tomorrow. Open questions: who watches the release, \
what number of errors makes us stop, and why nobody was alerted on Friday for almost three hours. \
Next meeting on Monday at ten.""",
    "train": """The night train leaves at 22:14 from platform seven and arrives at 07:52, if all \
goes well. There are twelve coaches, of which two have beds. My neighbour was a man with a cello, \
which had a ticket and a bed of its own. He told me that he had missed a concert once because of a \
wet leaf: it lay on the rail, the wheels slipped, the train stopped on a hill, and the one behind \
it had to push. We talked until midnight about towns we had only ever seen in the dark. Then he \
put out the light, and I lay listening to the wheels, trying to guess from their sound whether we \
were crossing a river, a station, or only the long flat fields. In the morning there was coffee, \
snow, and a border that nobody remembered having crossed.""",
}

_THINGS = """answer apple arm autumn ball bank basket bath bed bell bird boat bone book bottle bowl
box branch bread brick bridge brother bucket butter button cable cake camp captain card carpet cart
castle cat chain chair cheese child church circle class clock cloud coast coat coin colour corner
cotton country cousin cow crowd cup curtain dance daughter day desk dinner doctor dog door dream
dress drop duck ear earth edge egg engine evening eye face farm farmer father field finger fire fish
flag flame floor flower fog food foot forest fork friend fruit game garden gate gift girl glass
glove goat gold grain grass ground guest hair hall hammer hand harbour hat head heart hill hole home
horse hospital hotel hour house idea ink island jacket job judge key king kitchen knee ladder lady
lake lamp land language leaf leather letter library light line lion lip lock lunch machine map
market mass meal metal milk mill minute mirror model moment money month moon morning mother mountain
mouth museum music nail name neck needle neighbour net night noise north nose notebook number ocean
office oil orange oven owner page pair paper parent park part party pen pencil people person picture
pilot pipe place plan plane plate pocket poem point police pond pool potato price prince queen
question rain reason record ribbon rice ring river road rock roof room root rope rule sail salt sand
school screen sea season seat second secret seed shadow sheep shelf ship shirt shoe shop shoulder
silver singer sister skin sky sleeve snow soap sock soldier son song soup south spoon spring square
stable stair stamp star station step stick stone store storm story stove stranger street string
student sugar summer sun system table tail teacher team thing thread throat ticket tiger time tooth
tower town toy train tree trip truth tunnel uncle valley village voice wall war water wave week
wheel wind window wing winter woman wood wool word work world year"""
_ACTIONS = """accept add allow appear arrest ask attack avoid bake believe belong boil borrow burn
call carry change clean clear climb collect cook count cover cross deliver demand depend design
discover draw enjoy enter expect explain fail fall fasten fear fill float follow form gather greet
grow guard guess hang happen heat help hunt invent invite join jump kick knock laugh lay lead learn
lift listen load look mark mean measure melt mend need obey offer open pack paint pass pay pick
plant play point press print pull push raise reach read remember rent repair rest return roll sail
search seem send sew shout show sing smell sort speak start stay stretch talk taste teach tell test
thank think touch train treat trust turn visit wait walk want warn wash watch weigh whisper wish
wonder work"""
_QUALITIES = """bitter bold brave bright broad calm cheap clear clever cold cool cruel damp dark
deep direct dull eager even fair faint firm fresh full grand great harsh high honest keen kind light
long loud low mild narrow neat new odd old plain proud quick quiet rapid rich rough round sharp
short slow smart smooth soft sour steep stern stiff strange strict strong sweet swift tall tender
thick tight vast warm weak wild young"""


def ensure(cache_dir: Path | None = None) -> Path:
    """Return the demo model's folder; build it first if it is missing or incomplete.

    Building takes a few seconds. Any number of processes may call this at once: one builds, the
    others wait for it.

    Args:
        cache_dir: folder that holds the model's folder; by default ``econoserve`` in
            ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Returns:
        Absolute path of a folder that ``from_pretrained`` and ``--model-path`` accept.

    Raises:
        OSError: if the cache folder cannot be written.
    """
    cache_dir = (_default_cache_dir() if cache_dir is None else Path(cache_dir)).absolute()
    folder = cache_dir / VERSION
    if _is_complete(folder):
        return folder
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = open(cache_dir / f"{VERSION}.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise OSError(
            f"cache folder {cache_dir}: cannot be written ({error.strerror}); "
            "set XDG_CACHE_HOME to a folder that can"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when this process ends or dies
        if not _is_complete(folder):
            _replace(folder)
    return folder


def _default_cache_dir() -> Path:
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore a path that is not absolute.
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "econoserve"


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / MARKER).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _replace(folder: Path) -> None:
    """Build beside ``folder`` and move the result into place. The caller holds the lock."""
    for left_over in folder.parent.glob(f"{VERSION}.partial-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{VERSION}.partial-", dir=folder.parent))
    try:
        _build(partial)
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        (partial / MARKER).write_text(json.dumps(sizes, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _build(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _train_tokenizer()
    config = LlamaConfig(
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * HIDDEN_SIZE,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):  # its own initial weights must not disturb the caller
        model = LlamaForCausalLM(config)
    model.load_state_dict(_weights(model.state_dict(), tokenizer))
    with _no_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def corpus() -> Iterator[str]:
    """The text the tokenizer is trained on: the passages, and word families built from stems.

    Returns:
        The pieces, in the same order every time.
    """
    yield from PASSAGES.values()
    for stems, endings in (
        (_THINGS, ("", "s")),
        (_ACTIONS, ("", "s", "ed", "ing", "er")),
        (_QUALITIES, ("", "er", "est", "ly", "ness")),
    ):
        for stem, ending in itertools.product(stems.split(), endings):
            yield f" {stem}{ending} {stem.capitalize()}{ending}"


def _train_tokenizer() -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(
            f"vocabulary={tokenizer.get_vocab_size()}: the corpus yields fewer than {VOCAB_SIZE} "
            "tokens; add words to it"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _weights(
    shapes: "dict[str, torch.Tensor]", tokenizer: "PreTrainedTokenizerFast"
) -> "dict[str, torch.Tensor]":
    """Draw the weights; uniform, because that is bit-identical on every CPU and torch version."""
    import torch

    generator = np.random.default_rng(SEED)
    weights = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name].shape)
        kind = next((kind for kind in _SPREAD if kind in name), None)
        if kind is None:  # the norms
            weights[name] = torch.ones(shape)
            continue
        half_width = np.float32(_SPREAD[kind] * math.sqrt(3))
        values = (generator.random(shape, dtype=np.float32) * 2 - 1) * half_width
        if kind == "embed_tokens":
            values[:, 0] = _CONSTANT
        elif kind in ("o_proj", "down_proj"):
            values[0] = 0.0  # no layer writes to the constant column
        elif kind == "lm_head":
            values[tokenizer.eos_token_id] *= np.float32(_EOS_SPREAD)
            values[:, 0] = _readability_bias(tokenizer)
            values[tokenizer.eos_token_id, 0] = _EOS_BIAS
        weights[name] = torch.from_numpy(values)
    return weights


def _readability_bias(tokenizer: "PreTrainedTokenizerFast") -> list[float]:
    """A bias per token that keeps special tokens and lone non-ASCII bytes out of responses."""
    pieces = tokenizer.convert_ids_to_tokens(range(VOCAB_SIZE))
    return [
        _BIAS_NEVER if piece in SPECIAL_TOKENS or not piece.removeprefix("Ġ").isascii() else 0.0
        for piece in pieces
    ]


if __name__ == "__main__":
    print(ensure())
