//! Bundles made from a grammar of config features. A case is made from its seed alone, so that
//! one that fails can be made again: every case has one feature that is its turn and some more
//! that go with it. Nothing here runs anything.
//!
//! ```text
//! process   user, capabilities, limits, environment, terminal, what is executed
//! mounts    every type and option, propagation, masked and read-only paths, the root
//! linux     namespaces, mappings, devices, resources, sysctls, seccomp, hooks, annotations
//! refused   what is wrong in those
//! ```

mod linux;
mod mounts;
mod process;
mod refused;

use serde_json::{Value, json};

use crate::bundle::default_config;
use crate::crictl::Config;

/// Splitmix64: the same numbers for the same seed, everywhere.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n.max(1) as u64).unwrap_or(0)
    }

    pub fn chance(&mut self, one_in: usize) -> bool {
        self.below(one_in) == 0
    }

    pub fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    /// Each with a chance of one half, in their order.
    pub fn some<T: Clone>(&mut self, of: &[T]) -> Vec<T> {
        of.iter()
            .filter(|_| self.chance(2))
            .cloned()
            .collect::<Vec<_>>()
    }
}

/// Where things are that a config may point to.
#[derive(Clone, Debug)]
pub struct Places {
    /// In the path of every cgroup of the test.
    pub mark: String,
    /// On the host, shared by all cases: `tree/`, `file`.
    pub source: String,
    /// A process whose namespaces are there to be joined.
    pub neighbour: u32,
    /// Where hooks write what they saw.
    pub hook_log: String,
}

/// A bundle's config with what is to be done with it.
#[derive(Clone, Debug)]
pub struct Case {
    pub seed: u64,
    pub features: Vec<&'static str>,
    pub config: Config,
    /// Run on a pseudoterminal.
    pub terminal: bool,
    /// What the probe looks at beside itself.
    pub look: Vec<String>,
    /// Flags of `exec` for a case that is also created, started, killed and deleted.
    pub exec: Vec<String>,
}

impl Case {
    fn set(&mut self, pointer: &str, value: impl Into<Value>) {
        self.config = self.config.clone().set(pointer, value);
    }

    fn push(&mut self, pointer: &str, value: impl Into<Value>) {
        self.config = self.config.clone().push(pointer, value);
    }

    fn get(&self, pointer: &str) -> Value {
        self.config
            .0
            .pointer(pointer)
            .cloned()
            .unwrap_or(Value::Null)
    }

    fn look(&mut self, path: &str) {
        self.look.push(path.to_owned());
    }

    fn has(&self, feature: &str) -> bool {
        self.features.contains(&feature)
    }

    /// Adds a mount and looks at where it went.
    fn mount(&mut self, mount: Value) {
        if let Some(path) = mount["destination"].as_str() {
            self.look(path);
        }
        self.push("/mounts", mount);
    }

    /// Runs the probe over what was collected, unless a feature runs something else.
    fn finish(&mut self) {
        if self.get("/process/args") == json!(["/bin/probe"]) {
            let mut args = vec!["/bin/probe".to_owned(), "show".to_owned()];
            args.extend(self.look.iter().cloned());
            self.set("/process/args", args);
        }
    }
}

/// One production of the grammar. Two with the same slot exclude each other.
pub struct Feature {
    name: &'static str,
    slot: &'static str,
    apply: fn(&mut Case, &mut Dice, &Places),
}

const fn feature(
    name: &'static str,
    slot: &'static str,
    apply: fn(&mut Case, &mut Dice, &Places),
) -> Feature {
    Feature { name, slot, apply }
}

fn features() -> impl Iterator<Item = &'static Feature> {
    process::FEATURES
        .iter()
        .chain(mounts::FEATURES)
        .chain(linux::FEATURES)
}

/// How many cases give each feature its turn once.
pub fn round() -> u64 {
    features().count() as u64
}

/// The case of a seed. Features are applied in the grammar's order, whichever was drawn first.
pub fn case(seed: u64, places: &Places) -> Case {
    let all: Vec<&Feature> = features().collect();
    let mut dice = Dice::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
    let turn = usize::try_from(seed % round()).unwrap_or(0);
    let mut chosen = vec![turn];
    // The first round has each feature alone: what differs there needs no search.
    let more = if seed < round() { 0 } else { dice.below(5) };
    for _ in 0..more {
        let next = dice.below(all.len());
        if !chosen.iter().any(|c| all[*c].slot == all[next].slot) {
            chosen.push(next);
        }
    }
    chosen.sort_unstable();
    let mut case = Case {
        seed,
        features: chosen.iter().map(|c| all[*c].name).collect(),
        config: Config(default_config()).set("/linux/cgroupsPath", format!("/{}/c", places.mark)),
        terminal: false,
        look: Vec::new(),
        exec: Vec::new(),
    };
    for index in chosen {
        (all[index].apply)(&mut case, &mut dice, places);
    }
    case.exec = process::exec_flags(&mut dice);
    case.finish();
    case
}

/// Configs that one runtime or all refuse, each by its name.
pub fn refused(places: &Places) -> Vec<(&'static str, Config)> {
    let base = || {
        Config(default_config())
            .set("/linux/cgroupsPath", format!("/{}/c", places.mark))
            .set("/process/args", json!(["/bin/probe", "true"]))
    };
    process::refused(&base)
        .into_iter()
        .chain(mounts::refused(&base))
        .chain(refused::all(&base))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places {
        Places {
            mark: "mark".to_owned(),
            source: "/source".to_owned(),
            neighbour: 1,
            hook_log: "/log".to_owned(),
        }
    }

    #[test]
    fn case_same_seed_is_the_same_config() {
        for seed in 0..200 {
            let (a, b) = (case(seed, &places()), case(seed, &places()));
            assert_eq!(a.config.0, b.config.0);
            assert_eq!(a.features, b.features);
        }
    }

    #[test]
    fn case_one_round_gives_every_feature_its_turn_alone() {
        let mut seen: Vec<_> = (0..round())
            .map(|seed| case(seed, &places()).features)
            .collect();
        assert!(seen.iter().all(|f| f.len() == 1));
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len() as u64, round());
    }

    #[test]
    fn features_of_one_slot_exclude_each_other() {
        let slots: std::collections::BTreeMap<_, _> =
            features().map(|f| (f.name, f.slot)).collect();
        for seed in 0..500 {
            let case = case(seed, &places());
            let mut taken: Vec<_> = case.features.iter().map(|f| slots[f]).collect();
            let all = taken.len();
            taken.sort_unstable();
            taken.dedup();
            assert_eq!(taken.len(), all, "{:?}", case.features);
        }
    }
}
