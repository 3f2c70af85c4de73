"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """A mistake of the user's, told in one sentence that names the place and the mend.

    The command line prints it without a traceback and exits with code 2; everything else that is raised is a bug.
    """
