"""Where hydra looks for files: a command's own folder, conf/, the conf/ of plug-ins, in this order."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from qvgen.config.conf_folder import user_directory
from qvgen.config.plugins import find_plugins


class _FurtherFolders(SearchPathPlugin):
    """Tells hydra of the folders beside conf/: the command's own stands before it, those of plug-ins behind it."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add them to the search path of a composition."""
        if (folder := user_directory()) is not None:
            search_path.prepend(provider="command-line", path=f"file://{folder}")
        for plugin in find_plugins().usable:
            search_path.append(provider=f"plug-in {plugin.name}", path=f"file://{plugin.directory.resolve()}")


def register_folders() -> None:
    """Make the folders beside conf/ known to every composition from now on."""
    Plugins.instance().register(_FurtherFolders)
