"""`doctor` on a spool: one line for each thing, exit 1 if any is bad."""

from harness import MakeDaemon, merged


def test_doctor_names_what_is_wrong(make_daemon: MakeDaemon) -> None:
    """Each thing has one line; the exit status is 1 if any is bad."""
    daemon = make_daemon()
    daemon.run("init", str(daemon.home))
    daemon.drain()
    (daemon.inbox / "link.txt").symlink_to("/etc/hostname")
    well = daemon.run("doctor")
    daemon.write_config(merged({}, {"limits": {"min_free_disk_mib": 10**9}}))
    ill = daemon.run("doctor")

    assert well.returncode == 0, well.stdout
    assert "link.txt" in well.stdout
    assert ill.returncode == 1
    assert "min_free_disk_mib" in ill.stdout
