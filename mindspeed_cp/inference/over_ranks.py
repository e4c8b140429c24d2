"""Which rank this is of a communicator's, where one that is alone has none."""

from mindspeed_cp.comm import Communicator


class OverRanks:
    """What is computed over the ranks of a communicator; None is a rank that is alone."""

    communicator: Communicator | None

    @property
    def rank(self) -> int:
        """This one."""
        return 0 if self.communicator is None else self.communicator.rank

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.communicator is None else self.communicator.size
