"""The plans that come with kvwise, by name."""

from importlib.resources import files

from kvwise.core.errors import PlanError
from kvwise.study.plan import PAPERS, Plan, read_plan_text

DEFAULT, QUALITY, METHODS = "default", "quality", "methods"
PLANS = {DEFAULT: "default_plan.toml", QUALITY: "quality_plan.toml", METHODS: "methods_plan.toml"}


def built_in_plan(name: str) -> Plan:
    """The plan called `name`, or that of a paper; PlanError naming the known ones if there is none."""
    return read_plan_text(built_in_text(name), f"the {name} plan")


def built_in_text(name: str) -> str:
    """Its TOML, with comments."""
    file = PLANS.get(name) or PAPERS.get(_arxiv(name))
    if file is None:
        raise PlanError(f"no plan is called {name!r}; those that come with kvwise: {', '.join((*PLANS, *PAPERS))}")
    return files("kvwise.study").joinpath(file).read_text(encoding="utf-8")


def default_plan() -> Plan:
    """The plan that `kvwise study` runs when none is given."""
    return built_in_plan(DEFAULT)


def quality_plan() -> Plan:
    """The plan that `kvwise study --quality-only` runs when none is given."""
    return built_in_plan(QUALITY)


def methods_plan() -> Plan:
    """Every method that keeps less, reads less or stores in fewer bytes."""
    return built_in_plan(METHODS)


def paper_plan(paper: str) -> Plan:
    """The plan whose figures stand beside those of a paper; PlanError for a paper that is not known."""
    if _arxiv(paper) not in PAPERS:
        raise PlanError(f"no plan for the paper {paper!r}; known by their arXiv ids: {', '.join(PAPERS)} (Cake)")
    return built_in_plan(paper)


def _arxiv(name: str) -> str:
    return name.removeprefix("arXiv:").removeprefix("arxiv:")
