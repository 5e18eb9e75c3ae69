"""What a person types, made safe for Hydra: text kept whole, `experiment=` found, a mistake named with the nearest right word."""

import re
import shlex
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ldm.config.sweeps import list_values
from ldm.config.tree import walk
from ldm.errors import UserError

NON_CONFIG_FILES = ("study", "points")  # a study's yaml files that say what it asks and where it looks: no configs
ESCAPED_MISSING = "${oc.decode:\"'???'\"}"  # the text ??? itself, which OmegaConf takes for a value not given yet


def escape(text: str) -> str:
    """Text that OmegaConf resolves to itself, `${`, backslashes and `???` included."""
    return ESCAPED_MISSING if text == "???" else re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def unescape(text: str) -> str:
    """The inverse of escape."""
    return "???" if text == ESCAPED_MISSING else re.sub(r"((?:\\\\)*)\\\$\{", lambda found: found[1][::2] + "${", text)


def quote(text: str) -> str:
    """Text in the quotes of Hydra's override grammar."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The remedy "; did you mean 'x'?", or nothing when no word is close."""
    words = sorted(set(words))
    ends: dict[str, str] = {}
    for name in words:
        ends.setdefault(name.rsplit(".", 1)[-1], name)
    close = get_close_matches(word, words, 1) or [
        ends[end] for end in get_close_matches(word.rsplit(".", 1)[-1], ends, 1, 0.75)
    ]
    return f"; did you mean {close[0]!r}?" if close else ""


def is_base(option: str) -> bool:
    """Return whether a file of a group is only the base of options, and none itself: `_unet` of conf/net/_unet.yaml."""
    return option.startswith("_")


@dataclass(frozen=True)
class ConfigSearchPath:
    """The configs that can be named: folders searched for groups, and the repository's root, which holds experiments/.

    folders: conf/ first, then a user's --config-dir.
    """

    folders: tuple[Path, ...]
    root: Path

    def groups(self) -> dict[str, list[str]]:
        """Map each group to its options, by the folders' yaml files; the bases of options, `_name.yaml`, are left out."""
        found: dict[str, set[str]] = {}
        for folder in self.folders:
            for file in folder.rglob("*.yaml"):
                group = file.parent.relative_to(folder).as_posix()
                if group != "." and not group.startswith(("hydra", "experiments")) and not is_base(file.stem):
                    found.setdefault(group, set()).add(file.stem)
        return {group: sorted(options) for group, options in sorted(found.items())}

    def options(self, group: str) -> list[str]:
        """List the options of a group that Hydra itself finds, its own and those of experiments/ included; none where there is no such group."""
        from hydra import initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra

        with initialize_config_dir(str(self.folders[0]), version_base="1.3"):
            options = GlobalHydra.instance().config_loader().get_group_options(group, overrides=self.search_path())
        return [option for option in options if not is_base(option)]

    def search_path(self) -> list[str]:
        """Write the override that adds experiments/ and the folders after the first to those that Hydra searches."""
        places = [f"studies://{self.root}", *(f"file://{folder}" for folder in self.folders[1:])]
        return [f"hydra.searchpath=[{','.join(quote(escape(place)) for place in places)}]"]

    def studies(self) -> dict[str, str]:
        """What fingers type after `experiment=` -> the option of the group `experiments`: a study's sweep.yaml goes by the study's name."""
        found = {}
        for folder in (self.root, *self.folders):
            for file in sorted(folder.glob("experiments/*/*.yaml")):
                option = file.relative_to(folder / "experiments").with_suffix("").as_posix()
                if file.stem in NON_CONFIG_FILES:
                    continue
                found[option.removesuffix("/sweep")] = found[option] = option
        return found

    def resolve_study(self, name: str) -> str:
        """The option of `experiments` for one typed name.  Raises UserError with the nearest name."""
        studies = self.studies()
        if name.strip("/") not in studies:
            names = sorted(name for name in studies if not name.endswith("/sweep"))
            raise UserError(
                f"experiment={name}: no such study in {self.root / 'experiments'}{did_you_mean(name, names)}{format_choices(names)}"
            )
        return studies[name.strip("/")]


def format_choices(names: Collection[str], limit: int = 20) -> str:
    names = list(names)
    return f" (one of {', '.join(names[:limit])}{', ...' if len(names) > limit else ''})" if names else ""


def normalize_override(
    override: str, tree: ConfigSearchPath, text: Collection[str], paths: Collection[str], multirun: bool
) -> str:
    """One override as Hydra must read it.

    text: keys whose value is any text at all and arrives as typed.  paths: keys whose value is text, but for `null`.
    With multirun `choice(a,b)` sweeps over either.  Raises UserError for what the commands do not take.
    """
    key, sign, value = override.partition("=")
    if not sign and not key.startswith("~"):
        raise UserError(f"{override!r} is not key=value (see --help)")
    if key.startswith("+") and "@" not in key:  # `+group@place=option` is what `several` writes
        raise UserError(
            f"{override}: keys are not added from the command line, nothing would read them; write {override.lstrip('+')}"
        )
    if key == "experiments":
        raise UserError(f"experiments is the folder; type experiment={value.removesuffix('/sweep')}")
    if key == "experiment":
        if value in ("", "null"):
            return "experiments=null"
        return "experiments=" + ",".join(map(tree.resolve_study, _study_names(value, tree) if multirun else [value]))
    bases = re.findall(r"(?:^|[\[,(\s'\"])(_\w+)", value)
    if bases and (options := tree.groups().get(key.lstrip("+~").partition("@")[0])):
        raise UserError(
            f"{override}: {bases[0]} is the base of other options and no option itself"
            f"{did_you_mean(bases[0].lstrip('_'), options)}{format_choices(options)}"
        )
    if multirun and re.fullmatch(r"choice\(.*\)", value, re.DOTALL):
        return override
    if value == "nan" and key in tree.groups():  # else a number
        return f"{key}={quote(value)}"
    if key in text:
        return f"{key}={quote(escape(value))}"
    if key in paths and value != "null":
        return f"{key}={quote(value)}"
    return override


def _study_names(value: str, tree: ConfigSearchPath) -> list[str]:
    """List the studies of a sweep over `experiment`: `a,b`, or what a function of the override grammar stands for."""
    if not re.fullmatch(r"\w+\s*\(.*\)", value, re.DOTALL):
        return value.split(",")
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"experiment={value}")
    except HydraException as error:
        raise UserError(f"experiment={value}: {error}") from None
    if not override.is_discrete_sweep():
        raise UserError(f"experiment={value} does not list studies; write experiment=a,b")
    return list_values(override, lambda _: sorted(name for name in tree.studies() if not name.endswith("/sweep")))


def expand_group_list(override: str, tree: ConfigSearchPath) -> list[str]:
    """`group=[a,b]`, of a group with an option `compose`, as the overrides that put a and b into that option by their names.

    Raises UserError for an option that is not there.
    """
    found = re.fullmatch(r"(\w+)=\[([\w, ]+)\]", override)
    options = tree.groups().get(found[1], []) if found else []
    if found is None or "compose" not in options:
        return [override]
    group, names = found[1], [name.strip() for name in found[2].split(",") if name.strip()]
    for name in names:
        if name not in options:
            raise UserError(
                f"{override}: no such option {name!r}{did_you_mean(name, options)}{format_choices(options)}"
            )
    return [f"{group}=compose", *(f"+{group}@{group}.{name}={name}" for name in dict.fromkeys(names))]


def dotted_keys(config: Any) -> list[str]:
    """Every dotted path of a plain config, inner nodes included, what is inside lists left out."""
    return [path for path, _ in walk(config) if path and "[" not in path]


def explain_override_error(
    error: Exception,
    overrides: Sequence[str],
    tree: ConfigSearchPath,
    compose: Callable[[list[str]], Any],
    multirun: bool,
) -> str:
    """One line that says which override Hydra could not take and what was expected; Hydra's own words where that cannot be told.

    compose: overrides -> the plain config; called with the overrides that choose existing options, to know the keys that are there.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob
    from hydra.errors import HydraException, OverrideParseException

    groups = tree.groups()
    good, keyed = [], []
    for text in overrides:
        if text.startswith("hydra"):
            good.append(text)
            continue
        try:
            override = OverridesParser.create().parse_override(text)
        except (OverrideParseException, HydraException):
            key, _, value = text.partition("=")
            safe = shlex.quote(f"{key}={quote(value)}")
            return f"cannot read {text!r}: blanks, quotes and , = : [ ] {{ }} ( ) mean something in a value; quote it: {safe}"
        if override.is_sweep_override() and not multirun:
            return f"{text} is a sweep over several values: add -m, or quote the value"
        group = override.key_or_group
        if group not in groups:
            keyed.append((override, text))
            continue
        values: list[Any] = [override.value()]
        if isinstance(values[0], Glob):  # selects among the options that are there
            continue
        if override.is_interval_sweep():
            return f"{text}: {group} is a choice between configs, not a number{format_choices(groups[group])}"
        if override.is_discrete_sweep():
            values = [str(value).strip("'\"") for value in override.sweep_string_iterator()]
        for value in values:
            if isinstance(value, (dict, int, float)) and not isinstance(value, bool):
                return (
                    f"{group}={value}: {group} is a choice between configs, not a value{format_choices(groups[group])}"
                )
            for option in value if isinstance(value, list) else [value]:
                if option is not None and str(option) not in groups[group]:
                    return f"{group}={option}: no such option{did_you_mean(str(option), groups[group])}{format_choices(groups[group])}"
        good.append(text)
    try:
        there = dotted_keys(compose([text for text in good if not text.startswith("experiments=") or "," not in text]))
    except Exception:
        there = []
    for override, text in keyed:
        name = override.key_or_group
        if there and name not in there and not text.startswith("experiments="):
            return f"{text.removeprefix('~')}: no key {name!r}{did_you_mean(name, [*there, *groups, 'experiment'])}"
    said = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
    line = re.split("(?:Config s|S)earch path:", " ".join(" ".join(line for line in said if line).split()))[0].strip()
    plugin = re.search("Could not find 'hydra/(launcher|sweeper)/", line)
    return line + (
        "; pip install -e '.[sweep]' brings joblib, submitit_local, submitit_slurm and optuna" if plugin else ""
    )


def help_text(folder: Path, config_name: str, about: str) -> str:
    """The text of --help: what the script says about itself, the choices with their defaults, and the plain keys with their comments."""
    import yaml

    source = (folder / f"{config_name}.yaml").read_text()
    defaults: dict[str, str] = {}
    for entry in (yaml.safe_load(source) or {}).get("defaults", []):
        if isinstance(entry, dict):
            defaults.update({key.removeprefix("override ").strip("/ "): str(value) for key, value in entry.items()})
    lines = [about.strip(), "", "Choices, the default first:"]
    tree = ConfigSearchPath((folder,), folder.parent)
    for group, options in tree.groups().items():
        if group in defaults:
            first = [defaults[group]] if defaults[group] in options else []
            lines.append(f"  {group:<16} {'  '.join([*first, *(option for option in options if option not in first)])}")
    studies = [name for name in tree.studies() if not name.endswith("/sweep")]
    if "experiments" in defaults and studies:
        lines.append(f"  {'experiment':<16} {'  '.join(studies)}")
    lines += ["", "Keys:"]
    for name, value, comment in re.findall(r"^(\w+): *([^#\n{\[]*?) *(?:# *(.*))?$", source, re.MULTILINE):
        if name not in ("defaults", "hydra") and value:
            lines.append(f"  {f'{name}={value}':<28} {comment}".rstrip())
    lines += ["", "--cfg job shows the whole config; -m runs every combination of values given as a=1,2."]
    return "\n".join(lines)
