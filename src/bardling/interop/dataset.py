"""The dataset that a configuration means: a prepared folder, text that is prepared now, or token files of another trainer."""

from pathlib import Path

from bardling.config import DataConfig
from bardling.data.prepare import dataset_for
from bardling.data.shards import TokenDataset
from bardling.errors import UserError
from bardling.interop.tokenfiles import detect_token_folder, open_token_folder


def open_data(config: DataConfig) -> TokenDataset:
    """Open (or first make) the dataset of `config`.

    Raises:
        UserError: there is no such data, or it is damaged.
    """
    path = Path(config.source)
    try:
        foreign = not (path / "manifest.json").is_file() and detect_token_folder(path) is not None
    except OSError as error:  # a name that is too long, say
        raise UserError(f"data.source = {config.source[:100]!r}: cannot be opened ({error.strerror})") from None
    if foreign:
        return open_token_folder(path)
    return dataset_for(config)
