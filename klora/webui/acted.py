"""What acted in the passes of one picture: for its text, for its selection map, and said while it is made."""

from __future__ import annotations

import dataclasses
from typing import Any

from klora.engine.session import Session
from klora.fusion.plan import FusionPlan
from klora.settings import Settings
from klora.webui.injection import PLANS
from klora.webui.messages import comment, logger, without_effect
from klora.webui.picture_text import tell


class Acted:
    """Keeps what acted in a processing object's picture, pass by pass."""

    def __init__(self, p: Any) -> None:
        self._p = p
        self._steps: set[int] = set()
        # By pass, the second one True.
        self._plans: dict[bool, list[FusionPlan]] = {False: [], True: []}
        self._given: dict[bool, Settings] = {}

    def begin(self) -> None:
        """A pass is going to begin; the first one of a picture forgets the picture before."""
        if not getattr(self._p, "is_hr_pass", False):
            self._plans = {False: [], True: []}

    def step(self, session: Session) -> None:
        """The session has been told the noise level of a step."""
        moment = session.moment
        self._steps.add(min(moment.step, moment.steps - 1))

    def note(self, session: Session, hires: bool, given: Settings) -> None:
        """Keep what acted, with what was decided while sampling, for the steps that were made."""
        if self._steps and session.acted:
            plan = dataclasses.replace(session.observed, made=range(min(self._steps), max(self._steps) + 1))
            self._plans[hires].append(plan)
            self._given[hires] = given
            setattr(self._p, PLANS, [*getattr(self._p, PLANS, ()), plan])
        self._steps.clear()

    def tell(self) -> None:
        """Write it into the picture's text."""
        tell(self._p, self._plans[False], self._plans[True], self._given)


def report(p: Any, session: Session) -> None:
    """Say what a session's pair covers, and what of it does nothing."""
    coverage = session.pair.coverage
    share = "–" if session.plan.share is None else f"{session.plan.share:.0%}"
    logger.info(
        "K-LoRA: %s × %s: %d modules contested, %d subject only, %d style only, %d unmatched keys; subject %s",
        session.pair.subject.name,
        session.pair.style.name,
        len(coverage.contested),
        len(coverage.subject_only),
        len(coverage.style_only),
        len(coverage.unmatched),
        share,
    )
    for text in (*session.plan.warnings, *without_effect(session.pair, session.left_out)):
        comment(p, text)
    if unknown := coverage.unmatched:
        comment(p, f"keys of the LoRAs that are not understood and do nothing: {len(unknown)}, such as {unknown[0]}")
