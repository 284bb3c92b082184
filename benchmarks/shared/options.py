"""Options that name things, checked before anything is computed."""


def known_names(parser, option: str, given: str, known, *, separator: str = ",") -> list[str]:
    """The names in `given`; one that is not known ends the command with a message."""
    names = [name for name in given.split(separator) if name]
    for name in names:
        if name not in known:
            parser.error(f"{option} {name!r}: expected one of {', '.join(known)}")
    return names


def moments_up_to(parser, updates: int, known) -> list[int]:
    """Those of the known moments that a run of `updates` outer updates sees; a message if there is none."""
    moments = [moment for moment in known if moment <= updates]
    if not moments:
        parser.error(f"--updates {updates}: expected at least {known[0]}, the first moment")
    return moments
