"""Translate command-line overrides to Hydra's grammar and explain those that it rejects.

Literal text is quoted, `experiment=` is resolved to a study, and an unknown name is reported with the closest one.
"""

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

NON_CONFIG_FILES = ("study", "points")  # YAML files of a study that are not configs: its question and evaluation points
ESCAPED_MISSING = "${oc.decode:\"'???'\"}"  # the text ??? itself, which OmegaConf reads as a missing value


def escape(text: str) -> str:
    """Return text that OmegaConf resolves to `text`, including `${`, backslashes and `???`."""
    return ESCAPED_MISSING if text == "???" else re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def unescape(text: str) -> str:
    """Invert `escape`."""
    return "???" if text == ESCAPED_MISSING else re.sub(r"((?:\\\\)*)\\\$\{", lambda match: match[1][::2] + "${", text)


def quote(text: str) -> str:
    """Quote text for Hydra's override grammar."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return the hint "; did you mean 'x'?", or an empty string if no word is close."""
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
    """The configs that can be chosen: folders searched for groups, and the repository root with experiments/.

    folders: conf/ first, then a user's --config-dir.
    """

    folders: tuple[Path, ...]
    root: Path

    def groups(self) -> dict[str, list[str]]:
        """Map each group to its options, from the YAML files in the folders; base files, `_name.yaml`, are left out."""
        options: dict[str, set[str]] = {}
        for folder in self.folders:
            for file in folder.rglob("*.yaml"):
                group = file.parent.relative_to(folder).as_posix()
                if group != "." and not group.startswith(("hydra", "experiments")) and not is_base(file.stem):
                    options.setdefault(group, set()).add(file.stem)
        return {group: sorted(names) for group, names in sorted(options.items())}

    def options(self, group: str) -> list[str]:
        """List a group's options as Hydra sees them, including Hydra's own groups and experiments/; may be empty."""
        from hydra import initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra

        with initialize_config_dir(str(self.folders[0]), version_base="1.3"):
            options = GlobalHydra.instance().config_loader().get_group_options(group, overrides=self.search_path())
        return [option for option in options if not is_base(option)]

    def search_path(self) -> list[str]:
        """Return the override that adds experiments/ and all folders but the first to Hydra's search path."""
        sources = [f"studies://{self.root}", *(f"file://{folder}" for folder in self.folders[1:])]
        return [f"hydra.searchpath=[{','.join(quote(escape(source)) for source in sources)}]"]

    def studies(self) -> dict[str, str]:
        """Map what a user types after `experiment=` to the option of the group `experiments`.

        A study's sweep.yaml is also known by the study's name.
        """
        options = {}
        for folder in (self.root, *self.folders):
            for file in sorted(folder.glob("experiments/*/*.yaml")):
                option = file.relative_to(folder / "experiments").with_suffix("").as_posix()
                if file.stem in NON_CONFIG_FILES:
                    continue
                options[option.removesuffix("/sweep")] = options[option] = option
        return options

    def resolve_study(self, name: str) -> str:
        """Return the option of `experiments` for one typed name.  Raises UserError with the closest name."""
        studies = self.studies()
        if name.strip("/") not in studies:
            names = sorted(name for name in studies if not name.endswith("/sweep"))
            raise UserError(
                f"experiment={name}: no such study in {self.root / 'experiments'}"
                f"{did_you_mean(name, names)}{format_choices(names)}"
            )
        return studies[name.strip("/")]


def format_choices(names: Collection[str], limit: int = 20) -> str:
    names = list(names)
    return f" (one of {', '.join(names[:limit])}{', ...' if len(names) > limit else ''})" if names else ""


def normalize_override(
    override: str, tree: ConfigSearchPath, text: Collection[str], paths: Collection[str], multirun: bool
) -> str:
    """Translate one typed override to what Hydra has to read.

    text: keys with a literal value, which may be any text.
    paths: keys whose value is literal text, except `null`.
    multirun: `choice(a,b)` sweeps over values also for those keys.
    Raises UserError for what the commands do not accept.
    """
    key, sign, value = override.partition("=")
    if not sign and not key.startswith("~"):
        raise UserError(f"{override!r} is not key=value (see --help)")
    if key.startswith("+") and "@" not in key:  # expand_group_list writes `+group@node=option`
        raise UserError(
            f"{override}: the command line cannot add keys, nothing would read them; write {override.lstrip('+')}"
        )
    if key.startswith("callbacks."):  # the only node to which a command line adds keys
        return f"++{override}"
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
    if value == "nan" and key in tree.groups():  # unquoted it would be a number
        return f"{key}={quote(value)}"
    if key in text:
        return f"{key}={quote(escape(value))}"
    if key in paths and value != "null":
        return f"{key}={quote(value)}"
    return override


def _study_names(value: str, tree: ConfigSearchPath) -> list[str]:
    """List the studies of a sweep over `experiment`: `a,b`, or the values of a function of the override grammar."""
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
    """Expand `group=[a,b]`, for a group with an option `compose`, to overrides that add a and b to that option by name.

    Other overrides are returned unchanged.  Raises UserError for an unknown option.
    """
    match = re.fullmatch(r"(\w+)=\[([\w, ]+)\]", override)
    options = tree.groups().get(match[1], []) if match else []
    if match is None or "compose" not in options:
        return [override]
    group, names = match[1], [name.strip() for name in match[2].split(",") if name.strip()]
    for name in names:
        if name not in options:
            raise UserError(
                f"{override}: no such option {name!r}{did_you_mean(name, options)}{format_choices(options)}"
            )
    return [f"{group}=compose", *(f"+{group}@{group}.{name}={name}" for name in dict.fromkeys(names))]


def dotted_keys(config: Any) -> list[str]:
    """List every dotted path of a plain config, including inner nodes, but nothing inside lists."""
    return [path for path, _ in walk(config) if path and "[" not in path]


def explain_override_error(
    error: Exception,
    overrides: Sequence[str],
    tree: ConfigSearchPath,
    compose: Callable[[list[str]], Any],
    multirun: bool,
) -> str:
    """Return one line that names the override Hydra rejected and what was expected, or Hydra's own message if unclear.

    compose: overrides -> the plain config; called with the valid group choices, to know which keys exist.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob
    from hydra.errors import HydraException, OverrideParseException

    groups = tree.groups()
    valid, keyed = [], []
    for text in overrides:
        if text.startswith("hydra"):
            valid.append(text)
            continue
        try:
            override = OverridesParser.create().parse_override(text)
        except (OverrideParseException, HydraException):
            key, _, value = text.partition("=")
            safe = shlex.quote(f"{key}={quote(value)}")
            return (
                f"cannot read {text!r}: blanks, quotes and , = : [ ] {{ }} ( ) have a meaning in a value; "
                f"quote it: {safe}"
            )
        if override.is_sweep_override() and not multirun:
            return f"{text} is a sweep over several values: add -m, or quote the value"
        group = override.key_or_group
        if group not in groups:
            keyed.append((override, text))
            continue
        values: list[Any] = [override.value()]
        if isinstance(values[0], Glob):  # can only select existing options
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
                    hint = did_you_mean(str(option), groups[group])
                    return f"{group}={option}: no such option{hint}{format_choices(groups[group])}"
        valid.append(text)
    try:
        existing = dotted_keys(
            compose([text for text in valid if not text.startswith("experiments=") or "," not in text])
        )
    except Exception:
        existing = []
    for override, text in keyed:
        name = override.key_or_group
        if existing and name not in existing and not text.startswith("experiments="):
            return f"{text.removeprefix('~')}: no key {name!r}{did_you_mean(name, [*existing, *groups, 'experiment'])}"
    texts = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
    line = re.split("(?:Config s|S)earch path:", " ".join(" ".join(text for text in texts if text).split()))[0].strip()
    plugin = re.search("Could not find 'hydra/(launcher|sweeper)/", line)
    return line + (
        "; pip install -e '.[sweep]' installs joblib, submitit_local, submitit_slurm and optuna" if plugin else ""
    )


def help_text(folder: Path, config_name: str, about: str) -> str:
    """Return the text of --help: the script's description, the groups with defaults, the keys with their comments."""
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
    lines += ["", "--cfg job prints the complete config; -m runs every combination of values given as a=1,2."]
    return "\n".join(lines)
