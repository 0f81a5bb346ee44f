"""EconoServe (arXiv 2411.06364): each iteration fills both the forward pass and the KVC.

GTs in time-synced groups are admitted as the ledger's mode allows, what is left of the forward
pass is filled with prompts up to the TFS, and prompts whose GT does not fit yet are parked. The
ablation's variants differ only in the order of the queues and the mode of the ledger. All
constants are ours.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from econoserve.core.books import Books, TaskState
from econoserve.core.checks import check_capacity, choice_of
from econoserve.core.cost import CostModel, IterationWork, TfsConfig
from econoserve.core.draft import Draft
from econoserve.core.filling import PromptFiller
from econoserve.core.holding import Holding, HoldingConfig
from econoserve.core.kvc import KvcConfig, KvcMode
from econoserve.core.late import Late, LateWatch
from econoserve.core.order import Order, OrderConfig, Ordering
from econoserve.core.pace import DecodePace
from econoserve.core.pausing import Pausing, PausingConfig
from econoserve.core.policy import BookedPolicy
from econoserve.core.shedding import Shedding, SheddingConfig
from econoserve.core.types import IterationPlan, Launch, Outcome, Task, View
from econoserve.core.victims import VictimConfig, Victims

LEVELS = 4
"""Levels of urgency whose GTs are tested in vain in one plan."""


@dataclass(frozen=True, slots=True)
class EconoServeConfig:
    """The policy's constants.

    Attributes:
        capacity_tokens: size of the KVC.
        kvc: the ledger's mode and its constants.
        order: the order of the queues.
        victims: what a preemption costs.
        tfs: how the target forward size is chosen.
        parked_fraction: share of the KVC for prompts whose response does not fit yet.
        late: what becomes of prompts that cannot keep their SLO; a ``Late`` or its value.
        starvation_s: a task that waited so long beyond its latest start lets nobody past it.
        holding: how long prompts wait to start together.
        pausing: where prompts may be computed alone.
        shedding: who steps back in an overload.

    Raises:
        ValueError: a value is out of range, or of another type.
    """

    capacity_tokens: int
    kvc: KvcConfig = field(default_factory=KvcConfig)
    order: OrderConfig = field(default_factory=OrderConfig)
    victims: VictimConfig = field(default_factory=VictimConfig)
    tfs: TfsConfig = field(default_factory=TfsConfig)
    parked_fraction: float = 0.2
    late: Late = Late.DEMOTE
    starvation_s: float = 30.0
    holding: HoldingConfig = field(default_factory=HoldingConfig)
    pausing: PausingConfig = field(default_factory=PausingConfig)
    shedding: SheddingConfig = field(default_factory=SheddingConfig)

    def __post_init__(self) -> None:
        check_capacity(self.capacity_tokens)
        parts = {
            "kvc": KvcConfig,
            "order": OrderConfig,
            "victims": VictimConfig,
            "tfs": TfsConfig,
            "holding": HoldingConfig,
            "pausing": PausingConfig,
            "shedding": SheddingConfig,
        }
        for name, part in parts.items():
            value = getattr(self, name)
            if not isinstance(value, part):
                raise ValueError(f"{name}={value!r}: pass {name}={part.__name__}(...)")
        object.__setattr__(self, "late", choice_of("late", self.late, Late))
        if not 0 <= self.parked_fraction <= 1:
            raise ValueError(f"parked_fraction={self.parked_fraction}: give a share in [0, 1]")
        if not self.starvation_s >= 0:
            raise ValueError(f"starvation_s={self.starvation_s}: give 0 seconds or more")


ONLY_PLUS = {
    "holding": HoldingConfig(steps=0),
    "pausing": PausingConfig(kvc_fraction=0),
    "shedding": SheddingConfig(margin_fraction=0, step=0, most=0),
}
"""What the other variants have not: prompts that wait or go alone, requests that step back."""

VARIANTS = {
    "d": (KvcMode.EXACT, Order.ARRIVAL),
    "sd": (KvcMode.EXACT, Order.ARRIVAL_GROUPS),
    "sdo": (KvcMode.EXACT, Order.URGENCY),
    "full": (KvcMode.NESTED, Order.URGENCY),
    "plus": (KvcMode.RISK, Order.URGENCY),
}
"""The ablation: decoupled queues; + time-synced groups; + ordering; + pipelining; + all of ours,
which is the skyline with risk, prompts that start together or alone, and large requests that step
back."""


def variant(name: str, config: EconoServeConfig) -> EconoServeConfig:
    """A configuration with one of the ablation's variants set.

    Args:
        name: key of ``VARIANTS``.
        config: everything else; its ``kvc.mode`` and its ``order.order`` are replaced, even where
            they were given on purpose; of all but ``plus`` those of ``ONLY_PLUS``, too. For
            another pair, make ``EconoServe`` of a configuration.

    Returns:
        The configuration.

    Raises:
        KeyError: there is no such variant.
    """
    mode, order = VARIANTS[name]
    parts = {
        "kvc": replace(config.kvc, mode=mode),
        "order": replace(config.order, order=order),
    }
    if name != "plus":
        parts |= ONLY_PLUS
    return replace(config, **parts)


class EconoServe(BookedPolicy):
    """The policy; ``core.policy.Policy`` describes its methods.

    Args:
        config: its constants.
        cost: estimates iteration times; a new model if none is given.
    """

    def __init__(self, config: EconoServeConfig, cost: CostModel | None = None) -> None:
        self.config = config
        self.cost = CostModel() if cost is None else cost
        ledger = config.kvc.ledger(config.capacity_tokens)
        self.ordering = Ordering(config.order, self.cost, ledger)
        super().__init__(Books(ledger, self.ordering.pt_place, self.ordering.gt_place))
        self.victims = Victims(config.victims, self.books, self.cost, self.ordering)
        self.late = LateWatch(config.late, self.books, self.ordering)
        self.pace = DecodePace(self.books, self.cost)
        common = (self.books, self.ordering, self.cost, self.pace)
        self.holding = Holding(config.holding, *common)
        self.pausing = Pausing(config.pausing, *common)
        self.shedding = Shedding(config.shedding, config.capacity_tokens)
        self.prompts = PromptFiller(
            self.books,
            self.ordering,
            config.parked_fraction,
            config.starvation_s,
            self.shedding.margin_tokens,
        )

    def add(self, task: Task) -> None:
        """See ``Policy.add``."""
        super().add(task)
        state = self.books[task.rid]
        self.shedding.arrive(state)
        self.late.add(state)

    def on_launch(self, plan: IterationPlan, launch: Launch) -> None:
        """See ``Policy.on_launch``."""
        super().on_launch(plan, launch)
        self.holding.on_launch(launch)
        self.pace.on_launch(launch)
        if launch.prefilled and self.books.running:
            self.ordering.mixes = bool(launch.decoded)
        for rid in plan.demote:
            if rid in self.books:
                self.shedding.lose(self.books[rid])
        for rid in (*plan.demote, *(part.rid for part in launch.prefilled)):
            self.late.discard(rid)

    def on_iteration(self, work: IterationWork, elapsed_s: float) -> None:
        """See ``Policy.on_iteration``."""
        self.cost.observe(work, elapsed_s)
        self.pace.on_iteration(work, elapsed_s)

    def remove(self, rid: str, outcome: Outcome) -> None:
        """See ``Policy.remove``."""
        if outcome is Outcome.REJECTED and rid in self.books:
            self.shedding.lose(self.books[rid])
        super().remove(rid, outcome)
        self.late.discard(rid)

    def plan(self, view: View) -> IterationPlan:
        """See ``Policy.plan``."""
        draft = Draft(view, self.books)
        self._keep_promises(draft)
        self.victims.relieve(draft, view.now_s)
        self.late.handle(draft, view.now_s)
        self._resume(view, draft)
        if not self.books.prefilling and not len(self.books.waiting):
            return draft.plan()
        if self.books.prefilling or not self.holding.holds(draft, view):
            company = self.pausing.company(draft, view)
            draft.early_tokens = int(self.pausing.may_pause(draft, view))
            self.prompts.fill(draft, view, self.tfs_tokens(draft.decoding, draft.tpot_s), company)
            if self.pausing.pauses(draft, view):
                draft.pause()
        return draft.plan()

    def tfs_tokens(self, decoding: int, tpot_s: float) -> int:
        """The target forward size.

        Args:
            decoding: requests that decode in the pass.
            tpot_s: the tightest TPOT objective among them; infinity without one.

        Returns:
            Tokens.
        """
        context_tokens = self.ledger.decoding_tokens
        return self.config.tfs.tokens(self.cost, decoding, context_tokens, tpot_s)

    def _keep_promises(self, draft: Draft) -> None:
        """Predict anew the responses whose promise runs out, before it does."""
        for rid in self.ledger.due():
            response = self.books.response_left(self.books[rid], self.ledger.points)
            if response[-1] > 0:
                draft.extend(self.books[rid], response)

    def _resume(self, view: View, draft: Draft) -> None:
        """Let GTs join: those that were promised their response, then group by group."""
        for state in self.books.starting.values():
            room = draft.decoding < view.max_running and draft.free_tokens > 0
            if room and not draft.is_out(state):
                draft.join(state)
        queue, level, misses = self.books.ready, (), 0
        while (key := queue.after(level)) is not None and misses < LEVELS and not draft.blocked:
            level = key[:-1]
            if not self._resume_level(queue.level(level), view, draft):
                misses += LEVELS if self.ordering.strict else 1
        draft.gts_wait = misses > 0
        if not draft.decoding and not self.books.prefilling:
            self._resume_head(draft)

    def _resume_level(self, keys: list[tuple[float, ...]], view: View, draft: Draft) -> bool:
        """Admit the groups of one urgency; whether all of them were."""
        index = 0
        while index < len(keys):
            if self._resume_group(self.books.ready[keys[index]], view, draft):
                index += 1
                continue
            draft.blocked = self.ordering.starves(keys[index], view.now_s, self.config.starvation_s)
            if draft.blocked or self.ordering.strict or self.ordering.shorter_first:
                return False
            # Longer ones go first: find the longest group that still fits.
            index = bisect_left(
                keys, 1, lo=index + 1, key=lambda key: self._count(self.books.ready[key], draft, 1)
            )
        return True

    def _resume_group(self, group: Sequence[TaskState], view: View, draft: Draft) -> bool:
        """Admit as many members of a group as fit; whether all did."""
        most = min(len(group), view.max_running - draft.committed, draft.free_tokens)
        count = self._count(group, draft, most)
        members = (state for state in group if not draft.is_out(state))
        for state in islice(members, count):
            draft.resume(state, state.needed)
        return count == len(group)

    def _count(self, group: Sequence[TaskState], draft: Draft, most: int) -> int:
        """How many members of a group fit, each taken for the worst of them."""
        if most < 1:
            return 0
        if group[0].offloaded_tokens:
            # Each brings back KVC of its own size; one of them in a plan.
            return int(draft.fits_back(group[0]))
        if self.ledger.points == 1:
            worst = (group[-1] if self.ordering.shorter_first else group[0]).needed
        else:
            # Equal in the middle, they may differ elsewhere.
            responses = (state.needed for state in group if not draft.is_out(state))
            worst = tuple(map(max, zip(*islice(responses, most), strict=True)))
        return draft.trial.count(worst, most) if worst else 0

    def _resume_head(self, draft: Draft) -> None:
        """With nothing running, the first GT runs in any case; parked ones make room for it."""
        head = next((state for state in self.books.ready if not draft.is_out(state)), None)
        if head is not None:
            response = head.needed
            self.victims.make_room(draft, head, head.offloaded_tokens + response[-1])
            draft.resume(head, response)
