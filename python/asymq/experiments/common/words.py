"""Words that depend on a number."""


def count(number: int, noun: str, ending: str = "s") -> str:
    """Such as "1 seed" and "3 bits"."""
    return f"{number:,} {noun}" + ("" if number == 1 else ending)
