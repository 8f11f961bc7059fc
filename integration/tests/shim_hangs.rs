//! Something that the shim depends on does not move: its runtime, a reader, a disk, a cgroup. One
//! container waits; the shim, the others of its group and whoever wants an end of it do not.

use std::fs;
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::shim::stand::{Stand, alive, hanging_runtime};
use coracle_integration::shim::{CREATED, NOT_FOUND, RUNNING, Refused, Shim, refusal};
use coracle_integration::{leak, need_root, wait_for};
use nix::mount::{MsFlags, mount, umount};

/// A stand whose runtime hangs in the commands that `hang` names.
fn with_hanging_runtime(seconds: &str) -> Result<Stand> {
    let mut stand = Stand::new()?;
    stand.launcher = stand.launcher.env("CORACLE_SHIM_CALL_SECONDS", seconds);
    let real = stand.runtime.clone();
    stand.runtime = hanging_runtime(stand.dir(), &real)?;
    Ok(stand)
}

fn hang(stand: &Stand, command: &str) -> Result<()> {
    Ok(fs::write(stand.dir().join(format!("hang-{command}")), "")?)
}

fn move_on(stand: &Stand, command: &str) -> Result<()> {
    fs::remove_file(stand.dir().join(format!("hang-{command}")))?;
    let _ = fs::remove_file(stand.dir().join("hung"));
    Ok(())
}

fn wait_hung(stand: &Stand) -> Result<()> {
    let flag = stand.dir().join("hung");
    wait_for("the runtime to hang", Duration::from_secs(5), || {
        Ok(flag.exists().then_some(()))
    })
}

/// A container of the group works, and answers at once.
fn works(shim: &Shim, id: &str, exec: &str) -> Result<()> {
    let begun = Instant::now();
    shim.exec(id, exec, &["/usr/bin/sh", "-c", "exit 5"], "")?;
    shim.start(id, exec)?;
    ensure!(shim.wait(id, exec)?.exit_status == 5);
    shim.delete(id, exec)?;
    ensure!(shim.state(id, "")?.status == RUNNING);
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(1), "an exec took {took:?}");
    Ok(())
}

fn no_call_is_left(stand: &Stand) -> Result<()> {
    let mark = stand.bench.mark.clone();
    wait_for("the end of the calls", Duration::from_secs(5), || {
        let left = leak::processes(&mark).into_iter();
        Ok((left.filter(|p| p.contains("hanging-runtime")).count() == 0).then_some(()))
    })
}

type Answer = std::thread::JoinHandle<Result<Refused>>;

/// A call that is refused in the end, on a thread of its own.
fn in_vain<T: std::fmt::Debug>(call: impl FnOnce() -> Result<T> + Send + 'static) -> Answer {
    std::thread::spawn(move || refusal(call()))
}

fn said(answer: Answer) -> Result<Refused> {
    answer.join().map_err(|_| anyhow::anyhow!("panicked"))?
}

#[test]
fn runtime_that_hangs_is_ended_at_its_deadline_and_named() -> Result<()> {
    need_root!();
    let stand = with_hanging_runtime("2")?;
    let (shim, _) = stand.run("g", "other", "sleep 1000")?;
    stand.write("g", "c", "sleep 1000")?;

    hang(&stand, "create")?;
    let (caller, task) = (shim.clone(), stand.task("c"));
    let create = in_vain(move || caller.create(&task));
    wait_hung(&stand)?;
    works(&shim, "other", "e1")?;
    let refused = said(create)?;
    ensure!(
        refused.message.contains("create failed")
            && refused
                .message
                .contains("did not end within 2 s and was killed"),
        "{refused}"
    );
    ensure!(refusal(shim.state("c", ""))?.code == NOT_FOUND);
    no_call_is_left(&stand)?;
    let mounted = fs::read_to_string("/proc/thread-self/mountinfo")?;
    let rootfs = stand.bundle("c").join("rootfs").display().to_string();
    ensure!(!mounted.contains(&rootfs), "the rootfs is still mounted");
    move_on(&stand, "create")?;
    shim.create(&stand.task("c"))?;

    hang(&stand, "start")?;
    let caller = shim.clone();
    let start = in_vain(move || caller.start("c", ""));
    wait_hung(&stand)?;
    works(&shim, "other", "e2")?;
    ensure!(said(start)?.message.contains("start failed"));
    ensure!(shim.state("c", "")?.status == CREATED);
    move_on(&stand, "start")?;
    shim.start("c", "")?;

    hang(&stand, "exec")?;
    shim.exec("c", "e", &["/usr/bin/sh", "-c", "exit 6"], "")?;
    let caller = shim.clone();
    let exec = in_vain(move || caller.start("c", "e"));
    wait_hung(&stand)?;
    ensure!(shim.state("other", "")?.status == RUNNING);
    ensure!(said(exec)?.message.contains("exec failed"));
    move_on(&stand, "exec")?;
    shim.start("c", "e")?;
    ensure!(shim.wait("c", "e")?.exit_status == 6);
    shim.delete("c", "e")?;

    hang(&stand, "delete")?;
    shim.kill("c", "", 9, false)?;
    shim.wait("c", "")?;
    let caller = shim.clone();
    let delete = in_vain(move || caller.delete("c", ""));
    wait_hung(&stand)?;
    works(&shim, "other", "e3")?;
    ensure!(said(delete)?.message.contains("delete failed"));
    no_call_is_left(&stand)?;
    move_on(&stand, "delete")?;
    ensure!(shim.delete("c", "")?.exit_status == 137);
    shim.end("other")?;
    shim.shut_down()?;
    stand.finish()
}

#[test]
fn whoever_wants_an_end_does_not_wait_for_a_runtime_that_hangs() -> Result<()> {
    need_root!();
    // Two minutes: nobody here has them.
    let stand = with_hanging_runtime("120")?;
    let within = |begun: Instant| {
        let took = begun.elapsed();
        ensure!(took < Duration::from_secs(8), "took {took:?}");
        Ok(())
    };
    stand.write("g", "c", "sleep 1000")?;
    let shim = stand.launcher.start(&stand.bundle("c"), "c")?;

    // Delete during a create.
    hang(&stand, "create")?;
    let (caller, task) = (shim.clone(), stand.task("c"));
    let create = in_vain(move || caller.create(&task));
    wait_hung(&stand)?;
    let begun = Instant::now();
    ensure!(refusal(shim.delete("c", ""))?.code == NOT_FOUND);
    within(begun)?;
    let refused = said(create)?;
    ensure!(
        refused.message.contains("request to end its container"),
        "{refused}"
    );
    move_on(&stand, "create")?;

    // SIGKILL during a start.
    shim.create(&stand.task("c"))?;
    hang(&stand, "start")?;
    let caller = shim.clone();
    let start = in_vain(move || caller.start("c", ""));
    wait_hung(&stand)?;
    let begun = Instant::now();
    shim.kill("c", "", 9, true)?;
    ensure!(shim.wait("c", "")?.exit_status == 137);
    within(begun)?;
    said(start)?;
    move_on(&stand, "start")?;
    shim.delete("c", "")?;

    // The end of a container whose exec hangs.
    shim.create(&stand.task("c"))?;
    shim.start("c", "")?;
    hang(&stand, "exec")?;
    shim.exec("c", "e", &["/usr/bin/true"], "")?;
    let caller = shim.clone();
    let exec = in_vain(move || caller.start("c", "e"));
    wait_hung(&stand)?;
    let begun = Instant::now();
    shim.kill("c", "", 9, false)?;
    ensure!(shim.wait("c", "")?.exit_status == 137);
    within(begun)?;
    said(exec)?;
    move_on(&stand, "exec")?;
    shim.delete("c", "")?;
    no_call_is_left(&stand)?;
    shim.shut_down()?;
    stand.finish()
}

#[test]
fn dead_shims_runtime_that_hangs_does_not_hang_its_clean_up() -> Result<()> {
    need_root!();
    let stand = with_hanging_runtime("3")?;
    let (shim, pid) = stand.run("g", "c", "sleep 1000")?;
    shim.crash()?;
    hang(&stand, "delete")?;
    let begun = Instant::now();
    let error = stand.launcher.delete(&stand.bundle("c"), "c");
    let error = error.err().context("delete with a runtime that hangs")?;
    ensure!(
        error.to_string().contains("did not end within 3 s"),
        "{error}"
    );
    ensure!(begun.elapsed() < Duration::from_secs(6));
    // The processes are ended all the same, and the next attempt does the rest.
    ensure!(!alive(pid));
    no_call_is_left(&stand)?;
    move_on(&stand, "delete")?;
    let exit = stand.launcher.delete(&stand.bundle("c"), "c")?;
    ensure!(
        exit.exit_status == 137 && exit.pid == pid as u32,
        "{exit:?}"
    );
    stand.finish()
}

#[test]
fn reader_that_does_not_read_holds_up_its_own_container_alone() -> Result<()> {
    need_root!();
    let stand = Stand::new()?;
    let fifo = stand.dir().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU)?;
    // Opened, never read: a client that was stopped.
    let reader = fs::OpenOptions::new()
        .read(true)
        .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
        .open(&fifo)?;
    stand.write("g", "stuck", "/probe flood 1000000 100; echo never")?;
    let shim = stand.launcher.start(&stand.bundle("stuck"), "stuck")?;
    let mut task = stand.task("stuck").stdout(&fifo.display().to_string());
    task.request.stderr = String::new();
    let pid = shim.create(&task)?;
    shim.start("stuck", "")?;
    let cpu = || fs::read_to_string(format!("/proc/{}/stat", shim.pid()?)).map_err(Into::into);
    // Full: nothing moves, and the shim does not spin.
    std::thread::sleep(Duration::from_millis(700));
    let ticks = |stat: Result<String>| -> Result<u64> {
        let stat = stat?;
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split(' ').collect();
        Ok(fields[12].parse::<u64>()? + fields[13].parse::<u64>()?)
    };
    let before = ticks(cpu())?;
    let (_, other) = stand.run("g", "other", "i=0; while :; do echo n $i; i=$((i+1)); done")?;
    stand.wait_line("other", "n 1000")?;
    works(&shim, "other", "e")?;
    shim.end("other")?;
    ensure!(!alive(other));
    let idle = ticks(cpu())?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(
        ticks(cpu())? - idle <= 2,
        "the shim spins ({before}, {idle})"
    );
    ensure!(alive(pid));
    // Its end is told at once, and its deletion does not wait for the reader either.
    let begun = Instant::now();
    shim.kill("stuck", "", 9, false)?;
    ensure!(shim.wait("stuck", "")?.exit_status == 137);
    shim.delete("stuck", "")?;
    ensure!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    shim.ask("Shutdown", "any")?;
    shim.gone()?;
    drop(reader);
    fs::remove_file(&fifo)?;
    stand.finish()
}

#[test]
fn full_disk_under_a_log_ends_and_the_log_goes_on() -> Result<()> {
    need_root!();
    let stand = Stand::new()?;
    let small = stand.dir().join("small");
    fs::create_dir(&small)?;
    let kind = Some("tmpfs");
    mount(kind, &small, kind, MsFlags::empty(), Some("size=256k"))?;
    let filler = small.join("filler");
    stand.write("g", "c", "exec /probe lines 0 1")?;
    let shim = stand.launcher.start(&stand.bundle("c"), "c")?;
    let log = small.join("log");
    let pid = shim.create(&stand.task("c").log(&log))?;
    shim.start("c", "")?;
    let size = || fs::metadata(&log).map_or(0, |m| m.len());
    wait_for("output", Duration::from_secs(5), || {
        Ok((size() > 0).then_some(()))
    })?;
    // Until nothing more fits.
    let filled = fs::write(&filler, vec![0; 1 << 20]);
    ensure!(filled.is_err(), "the disk is not full");
    let dropped = || -> Result<u64> { Ok(shim.private_status("c")?.log_bytes_dropped) };
    wait_for("a loss", Duration::from_secs(10), || {
        Ok((dropped()? > 2000).then_some(()))
    })?;
    let (_, other) = stand.run("g", "other", "sleep 1000")?;
    works(&shim, "other", "e")?;
    ensure!(alive(pid) && alive(other));
    fs::remove_file(&filler)?;
    let full = size();
    wait_for("output after that", Duration::from_secs(5), || {
        Ok((size() > full + 2000).then_some(()))
    })?;
    let lost = dropped()?;
    shim.end("c")?;
    shim.end("other")?;
    let text = fs::read_to_string(&log)?;
    let lines = coracle_integration::crictl::parse_log(&text)?;
    let number = |text: &str| {
        text.strip_prefix("line ")
            .and_then(|n| n.parse::<u64>().ok())
    };
    let numbers: Vec<u64> = lines
        .iter()
        .map(|l| number(&l.text).with_context(|| format!("torn: {l:?}")))
        .collect::<Result<_>>()?;
    // What is missing is what was counted, to the byte.
    let missing = numbers.windows(2).flat_map(|n| n[0] + 1..n[1]);
    let line = |n| "2026-01-01T00:00:00.000000000Z stdout F line \n".len() + format!("{n}").len();
    let bytes: usize = missing.map(line).sum();
    ensure!(
        lost > 0 && bytes as u64 == lost,
        "{bytes} bytes are missing, {lost} counted"
    );
    let journal = fs::read_to_string(stand.bundle("c").join("shim.log"))?;
    ensure!(
        journal.contains("is lost: No space left on device")
            && journal.contains("is written again"),
        "{journal}"
    );
    umount(&small)?;
    shim.shut_down()?;
    stand.finish()
}

/// Freezes all of a container's processes, as an administrator would.
fn freeze(stand: &Stand, id: &str) -> Result<()> {
    let mut frozen = 0;
    for cgroup in stand.cgroups(id) {
        for (file, word) in [("freezer.state", "FROZEN"), ("cgroup.freeze", "1")] {
            let path = cgroup.join(file);
            if path.exists() {
                fs::write(&path, word).with_context(|| path.display().to_string())?;
                frozen += 1;
            }
        }
    }
    ensure!(frozen > 0, "no freezer for {id}");
    Ok(())
}

fn frozen_containers_can_go(stand: Stand) -> Result<()> {
    let script = "sleep 1000 & sleep 1001";
    let (shim, running) = stand.run("g", "running", script)?;
    let (_, created) = stand.create("g", "created", script)?;
    for id in ["running", "created"] {
        freeze(&stand, id)?;
    }
    let begun = Instant::now();
    shim.kill("running", "", 9, false)?;
    ensure!(shim.wait("running", "")?.exit_status == 137);
    shim.delete("running", "")?;
    shim.delete("created", "")?;
    ensure!(!alive(running) && !alive(created));
    // And without a shim.
    let (_, running) = stand.run("g", "running", script)?;
    let (_, created) = stand.create("g", "created", script)?;
    for id in ["running", "created"] {
        freeze(&stand, id)?;
    }
    shim.crash()?;
    for id in ["running", "created"] {
        let exit = stand.launcher.delete(&stand.bundle(id), id)?;
        ensure!(exit.exit_status == 137, "{id}: {exit:?}");
    }
    ensure!(!alive(running) && !alive(created));
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(8), "took {took:?}");
    stand.finish()
}

#[test]
fn frozen_containers_can_be_killed_and_deleted() -> Result<()> {
    need_root!();
    frozen_containers_can_go(Stand::new()?)
}

#[test]
fn frozen_containers_can_be_killed_and_deleted_in_the_unified_hierarchy() -> Result<()> {
    need_root!();
    frozen_containers_can_go(Stand::unified()?)
}

#[test]
fn background_child_that_holds_the_output_open_does_not_hold_the_end() -> Result<()> {
    need_root!();
    let stand = Stand::new()?;
    let (shim, pid) = stand.run("g", "c", "sleep 1000")?;
    // Of an exec, whose child lives on in the container and keeps its stdout.
    let fifo = stand.dir().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU)?;
    let log = format!("cri-log://{}", stand.dir().join("exec.log").display());
    for (exec, stdout) in [("log", log), ("fifo", fifo.display().to_string())] {
        let script = "echo begun; sleep 1003 & exit 8";
        shim.exec("c", exec, &["/usr/bin/sh", "-c", script], &stdout)?;
        let begun = Instant::now();
        shim.start("c", exec)?;
        ensure!(shim.wait("c", exec)?.exit_status == 8);
        ensure!(shim.delete("c", exec)?.exit_status == 8);
        ensure!(
            begun.elapsed() < Duration::from_secs(4),
            "{exec}: {:?}",
            begun.elapsed()
        );
    }
    let kept = fs::read_to_string(stand.dir().join("exec.log"))?;
    ensure!(kept.contains("begun"), "{kept}");
    ensure!(alive(pid));
    shim.end("c")?;
    fs::remove_file(&fifo)?;
    shim.shut_down()?;
    stand.finish()
}

#[test]
fn what_a_former_boot_left_is_cleared_up_and_harms_nobody() -> Result<()> {
    need_root!();
    let stand = Stand::new()?;
    let (shim, first) = stand.run("g", "a", "sleep 1000")?;
    let (_, second) = stand.run("g", "b", "sleep 1000")?;
    let (_, _) = stand.run("g", "done", "exit 9")?;
    let ended = shim.wait("done", "")?;
    shim.crash()?;
    // The processes end with the machine; files, were they on a disk, and pids that come again
    // do not. Here the pid of a record is that of a stranger who was started at the same tick.
    for pid in [first, second] {
        let pid = rustix::process::Pid::from_raw(pid).context("pid")?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    }
    wait_for("their end", Duration::from_secs(5), || {
        Ok((!alive(first) && !alive(second)).then_some(()))
    })?;
    let mut stranger = std::process::Command::new("sleep").arg("1004").spawn()?;
    let record = stand.bundle("a").join("shim.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&record)?)?;
    let stat = fs::read_to_string(format!("/proc/{}/stat", stranger.id()))?;
    let start = stat
        .rsplit_once(')')
        .context("stat")?
        .1
        .split_whitespace()
        .nth(19);
    json["init_pid"] = stranger.id().into();
    json["init_start"] = start.context("field 22")?.parse::<u64>()?.into();
    fs::write(&record, serde_json::to_vec(&json)?)?;
    // The stranger sits in a cgroup of that name, too.
    for cgroup in stand.cgroups("a") {
        if !cgroup.starts_with("/sys/fs/cgroup/cpuset") {
            fs::write(cgroup.join("cgroup.procs"), stranger.id().to_string())?;
        }
    }
    // Nor does the runtime's own record speak of anything that runs.
    let root = stand.root().join("death");
    for id in ["a", "b", "done"] {
        fs::remove_dir_all(root.join(id))?;
    }
    let boot = stand.dir().join("boot_id");
    fs::write(&boot, "11111111-2222-3333-4444-555555555555\n")?;
    let none: Option<&str> = None;
    let kernel = "/proc/sys/kernel/random/boot_id";
    mount(Some(&boot), kernel, none, MsFlags::MS_BIND, none)?;

    // One pass: the group's next start, in a boot that it does not know.
    let (next, pid) = stand.run("g", "new", "sleep 1000")?;
    let calm = stranger.try_wait()?.is_none();
    stranger.kill()?;
    stranger.wait()?;
    ensure!(calm, "a stranger was killed");
    for id in ["a", "b"] {
        ensure!(
            !stand.bundle(id).join("shim.json").exists(),
            "{id} is still on record"
        );
        ensure!(stand.launcher.delete(&stand.bundle(id), id)?.exit_status == 137);
    }
    let exit = stand.launcher.delete(&stand.bundle("done"), "done")?;
    ensure!(exit.exit_status == 9 && exit.exited_at == ended.exited_at);
    ensure!(alive(pid) && next.end("new")?.exit_status == 137);
    next.shut_down()?;
    umount(kernel)?;
    leak::remove_cgroups(&stand.bench.mark);
    stand.finish()
}
