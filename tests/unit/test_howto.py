"""docs/howto.md: what stands there is read by the loaders that a site's files go through."""

import re
from pathlib import Path

from wnodes_core import settings
from wnodes_core.images.store import Store
from wnodes_core.plugins import Plugins

TEXT = (Path(__file__).parents[2] / "docs" / "howto.md").read_text()


def blocks(kind):
    return re.findall(rf"(?ms)^```{kind}\n(.*?)^```$", TEXT)


def test_every_settings_block_loads(tmp_path):
    assert len(blocks("yaml settings")) >= 2
    for number, text in enumerate(blocks("yaml settings")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        settings.load(path, site_folder=str(tmp_path / "none"))


def test_the_catalogue_block_names_images(tmp_path):
    site = tmp_path / "images.d"
    site.mkdir()
    for text in blocks("yaml catalogue"):
        (site / "site.yaml").write_text(text)
    store = Store(tmp_path / "store", extra=(str(site),))
    assert [str(entry) for entry in store.entries()] == ["el9:2026.1"] and not store.problems()


def test_the_policy_plug_in_registers_and_refuses():
    import types

    module = types.ModuleType("chem")
    exec(compile(blocks("python")[0], "docs/howto.md", "exec"), module.__dict__)
    plugins = Plugins(builtins=(), scan=False)
    plugins.register(module, "chem")
    assert plugins.found[-1].problem == ""
    assert len(plugins.hook.wnodes_request_admit.get_hookimpls()) == 1
