"""What every network provider must do with a port, as tests that its author inherits (root).

::

    class TestMine(NetworkContract):
        provider, kind = "my_package.plugin", "mine"

``make_node`` gives the worker node, a ``NetworkNode``; override it for what your ports are made of. Providers whose
guests' frames the node itself holds inherit ``NetworkFramesContract`` instead, which has the enemy's half, too.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from wnodes_core.api import Nic, Port, errors
from wnodes_core.testing.network_node import NetworkNode, elsewhere

Made = Callable[..., tuple[Port, Nic]]
_STEPS = 60  # more than any provider has


class NetworkContract:
    """Attach, detach, and whatever may come between."""

    provider = ""
    kind = ""

    @classmethod
    def make_node(cls) -> NetworkNode:
        """The worker node that the ports of all tests of the class are made on."""
        return NetworkNode(cls.kind)

    @pytest.fixture(scope="class")
    @classmethod
    def site(cls) -> Iterator[NetworkNode]:
        """The node, as long as the class."""
        if os.getuid():
            pytest.fail("ports are made by root: run these tests as root")
        made = cls.make_node()
        yield made
        made.close()

    @pytest.fixture
    def node(self, site: NetworkNode) -> Iterator[NetworkNode]:
        """The node; at the end of every test it must be as it was."""
        before = site.state()
        yield site
        assert site.state() == before

    @pytest.fixture
    def hooks(self) -> Any:
        """The module under test."""
        return importlib.import_module(self.provider)

    @pytest.fixture
    def allot(self, hooks: Any, node: NetworkNode) -> Callable[..., Port]:
        """A port as wnodesd journals it, before anything is made."""

        def decide(*words: Any, taken: tuple[Port, ...] = (), **more: Any) -> Port:
            port = node.port(*words, **more)
            if not hasattr(hooks, "wnodes_port_allot"):
                return port
            made: Port = node.call(hooks.wnodes_port_allot, port=port, taken=taken)
            assert replace(made, device="", mac="") == replace(port, device="", mac="")
            return made

        return decide

    @pytest.fixture
    def attach(self, hooks: Any, node: NetworkNode, allot: Any) -> Iterator[Made]:
        """An attached port and its NIC; detached afterwards."""
        with ExitStack() as stack:

            def make(*words: Any, **more: Any) -> tuple[Port, Nic]:
                port = allot(*words, **more)
                stack.callback(self._detach, hooks, node, port)
                nic = node.call(hooks.wnodes_port_attach, port=port)
                assert isinstance(nic, Nic)
                return port, nic

            yield make

    @staticmethod
    def _detach(hooks: Any, node: NetworkNode, port: Port) -> None:
        assert node.call(hooks.wnodes_port_detach, port=port) is True

    def test_the_nic_says_what_the_vm_is_to_be_given(self, attach: Made) -> None:
        port, nic = attach()
        assert nic.kind in ("tap", "user", "pci")
        assert nic.mac == port.mac
        assert not nic.device or nic.device == port.device
        assert set(nic.addresses) >= set(port.addresses) or nic.kind == "user"
        assert Nic.from_dict(json.loads(json.dumps(nic.to_dict()))) == nic
        assert Port.from_dict(json.loads(json.dumps(port.to_dict()))) == port

    def test_attached_again_nothing_changes(self, hooks: Any, node: NetworkNode, attach: Made) -> None:
        port, nic = attach()
        before = node.state()
        again = Port.from_dict(json.loads(json.dumps(port.to_dict())))
        assert node.call(hooks.wnodes_port_attach, port=again) == nic
        assert node.state() == before

    def test_what_was_never_made_is_removed(self, hooks: Any, node: NetworkNode, allot: Any) -> None:
        port = allot()
        for _ in range(2):
            self._detach(hooks, node, port)

    def test_removed_twice_it_is_gone(self, hooks: Any, node: NetworkNode, attach: Made) -> None:
        port, _ = attach()
        self._detach(hooks, node, port)

    def test_another_process_attaches_again_and_removes(self, hooks: Any, node: NetworkNode, attach: Made) -> None:
        """As a restarted wnodesd does: all that it knows stands in the journal."""
        port, nic = attach()
        again = Port.from_dict(json.loads(json.dumps(port.to_dict())))
        assert elsewhere(lambda: node.call(hooks.wnodes_port_attach, port=again) == nic)
        assert elsewhere(lambda: node.call(hooks.wnodes_port_detach, port=again))

    def test_another_s_port_is_left_alone(self, hooks: Any, node: NetworkNode, allot: Any) -> None:
        other = replace(allot(), kind=f"not-{self.kind}")
        if hasattr(hooks, "wnodes_port_allot"):
            assert node.call(hooks.wnodes_port_allot, port=other, taken=()) is None
        assert node.call(hooks.wnodes_port_attach, port=other) is None
        assert node.call(hooks.wnodes_port_detach, port=other) is None

    def test_each_piece_that_a_stranger_removed_is_made_again(
        self, hooks: Any, node: NetworkNode, attach: Made, allot: Any
    ) -> None:
        """The sweeper attaches the ports of all leases again and again; an undo may come first."""
        port, nic = attach()
        whole = node.state()
        for piece, remove in node.pieces(port).items():
            remove()
            assert node.call(hooks.wnodes_port_attach, port=port) == nic, piece
            assert node.state() == whole, piece
        for remove in node.pieces(port).values():
            remove()
            self._detach(hooks, node, port)
            assert node.call(hooks.wnodes_port_attach, port=port) == nic

    def test_one_of_two_leases_leaves(self, hooks: Any, node: NetworkNode, attach: Made, allot: Any) -> None:
        """What they share stays with the other; nothing of the one does."""
        port, nic = attach()
        alone = node.state()
        second = allot("two", 11, taken=(port,))
        node.call(hooks.wnodes_port_attach, port=second)
        self._detach(hooks, node, second)
        assert node.state() == alone
        assert node.call(hooks.wnodes_port_attach, port=port) == nic

    def test_a_name_that_is_another_s_is_refused_and_left_to_it(
        self, hooks: Any, node: NetworkNode, allot: Any
    ) -> None:
        port = allot()
        free = node.occupy(port)
        if free is None:
            return
        taken = node.state()
        try:
            with pytest.raises(errors.TransientError, match="taken on this node by another"):
                node.call(hooks.wnodes_port_attach, port=port)
            self._detach(hooks, node, port)
            assert node.state() == taken
        finally:
            free()

    @pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
    def test_kill_9_before_any_step_is_undone(
        self, hooks: Any, node: NetworkNode, attach: Made, allot: Any, beside: bool
    ) -> None:
        """Of attach; then of its undo, too; then it is undone in peace, and nothing of another lease with it."""
        taken = (attach()[0],) if beside else ()
        port, before = allot("two", 11, taken=taken), node.state()
        for step in range(1, _STEPS):
            if elsewhere(lambda: bool(node.call(hooks.wnodes_port_attach, port=port)), dies_at=step) is not None:
                break
            elsewhere(lambda: node.call(hooks.wnodes_port_detach, port=port), dies_at=1 + step % 4)
            self._detach(hooks, node, port)
            assert node.state() == before, step
        else:
            pytest.fail(f"attach has more than {_STEPS} steps")
        self._detach(hooks, node, port)
