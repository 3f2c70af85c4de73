"""The exceptions that are the user's to mend."""


class UserError(ValueError):
    """A mistake of the user's, told in one sentence that names the place and the mend.

    The command line prints it without a traceback and exits with code 2; everything else that is raised is a bug.

    Attributes:
        told: another process of the run prints it, so this one need not.
    """

    told = False


class SharedError(UserError):
    """A `UserError` that every process of a run raises at the same place, so that they can still save together."""
