//! Reads this process's rank from the environment variables of a launcher (torchrun, srun, mpirun).

use crate::error::{Result, usage};

/// This process's rank among the processes that a launcher started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Name of the launcher.
    pub launcher: &'static str,
    pub rank: usize,
    pub world_size: usize,
    /// Local rank: the rank among the processes of this host, if the launcher sets it.
    pub local_rank: Option<usize>,
    /// Address on which rank 0 listens; only for launchers without MPI, and if it is set.
    pub master: Option<Master>,
}

/// Address on which rank 0 listens for the other ranks (`MASTER_ADDR`, `MASTER_PORT`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Master {
    pub host: String,
    pub port: u16,
    /// Name of the run; connections from other runs are refused.
    pub run: String,
}

/// Environment variables of one launcher.
struct Launcher {
    name: &'static str,
    rank: &'static str,
    world_size: &'static str,
    local_rank: &'static str,
    /// Another variable that must be set for the three to apply to this process.
    needs: Option<&'static str>,
    /// Variables that together show that another launcher is meant.
    unless: &'static [&'static str],
    /// Whether it is an MPI launcher; MPI connects the ranks itself.
    mpi: bool,
}

/// Of a step of SLURM, started by srun. A plain sbatch script also has SLURM_PROCID = 0.
const STEP: &str = "SLURM_STEP_NUM_TASKS";

/// In order of precedence: under mpirun inside sbatch, the variables of both are set.
const LAUNCHERS: [Launcher; 5] = [
    Launcher { mpi: false, ..launcher("torchrun", ["RANK", "WORLD_SIZE", "LOCAL_RANK"]) },
    launcher("Open MPI", ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"]),
    launcher("MVAPICH2", ["MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"]),
    Launcher {
        // `srun --mpi=pmi2`, the default of many clusters, sets PMI_RANK for programs without MPI as well.
        unless: &[STEP, "MASTER_ADDR"],
        ..launcher("MPICH", ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"])
    },
    Launcher {
        needs: Some(STEP),
        // srun can also start MPI ranks; those do not set MASTER_ADDR.
        mpi: false,
        ..launcher("SLURM", ["SLURM_PROCID", STEP, "SLURM_LOCALID"])
    },
];

const fn launcher(name: &'static str, variables: [&'static str; 3]) -> Launcher {
    let [rank, world_size, local_rank] = variables;
    Launcher { name, rank, world_size, local_rank, needs: None, unless: &[], mpi: true }
}

/// This process's rank from its environment; `None` if no launcher started it.
///
/// # Errors
/// A launcher's variables are incomplete or not numbers.
pub fn place() -> Result<Option<Place>> {
    resolve(|name| std::env::var(name).ok())
}

fn resolve(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Place>> {
    for launcher in &LAUNCHERS {
        let others = !launcher.unless.is_empty() && launcher.unless.iter().all(|name| variable(name).is_some());
        if others || launcher.needs.is_some_and(|name| variable(name).is_none()) {
            continue;
        }
        let (rank, world_size) = (variable(launcher.rank), variable(launcher.world_size));
        let hint = format!("start with {}, or unset the variable", launcher.name);
        let missing = |set: &str, missing: &str| usage(format!("{set} is set, but {missing} is not"), &hint);
        match (rank, world_size) {
            (None, None) => {}
            (Some(_), None) => return Err(missing(launcher.rank, launcher.world_size)),
            (None, Some(_)) => return Err(missing(launcher.world_size, launcher.rank)),
            (Some(rank), Some(world_size)) => {
                let number = |name: &str, text: &str| -> Result<usize> {
                    text.trim().parse().map_err(|_| usage(format!("{name} = `{text}` is not a number"), &hint))
                };
                let local_rank = variable(launcher.local_rank);
                let place = Place {
                    launcher: launcher.name,
                    rank: number(launcher.rank, &rank)?,
                    world_size: number(launcher.world_size, &world_size)?,
                    local_rank: local_rank.map(|text| number(launcher.local_rank, &text)).transpose()?,
                    master: if launcher.mpi { None } else { master(&variable)? },
                };
                if place.rank >= place.world_size {
                    let (rank, world_size) = (place.rank, place.world_size);
                    let what = format!("{} = {rank} of {} = {world_size}", launcher.rank, launcher.world_size);
                    return Err(usage(format!("{what}: ranks are counted from 0"), hint));
                }
                return Ok(Some(place));
            }
        }
    }
    Ok(None)
}

/// Address on which rank 0 listens, from `MASTER_ADDR` and `MASTER_PORT`.
fn master(variable: &impl Fn(&str) -> Option<String>) -> Result<Option<Master>> {
    let (Some(host), Some(port)) = (variable("MASTER_ADDR"), variable("MASTER_PORT")) else { return Ok(None) };
    let wrong = || {
        usage(format!("MASTER_PORT = `{port}` is not a port"), "use a number from 1 to 65534 that no other run uses")
    };
    let number: u16 = port.trim().parse().ok().filter(|port| (1..u16::MAX).contains(port)).ok_or_else(wrong)?;
    // torchrun's own store already listens on MASTER_PORT.
    let taken = variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|text| text == "True");
    let run = variable("TORCHELASTIC_RUN_ID").or_else(|| variable("SLURM_JOB_ID")).unwrap_or_default();
    Ok(Some(Master { host, port: number + u16::from(taken), run }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn resolved(text: &str) -> Result<Option<Place>> {
        let variables: HashMap<&str, &str> = text.split_whitespace().filter_map(|pair| pair.split_once('=')).collect();
        resolve(|name| variables.get(name).map(|value| (*value).to_owned()))
    }

    #[test]
    fn each_launcher_is_known_by_its_variables() {
        let cases = [
            ("RANK=3 WORLD_SIZE=8 LOCAL_RANK=1 MASTER_ADDR=a", "torchrun", Some(1)),
            ("OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=0", "Open MPI", Some(0)),
            ("MV2_COMM_WORLD_RANK=3 MV2_COMM_WORLD_SIZE=8", "MVAPICH2", None),
            ("PMI_RANK=3 PMI_SIZE=8 MPI_LOCALRANKID=2", "MPICH", Some(2)),
            ("SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=8 SLURM_LOCALID=3", "SLURM", Some(3)),
            ("OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=8 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1", "Open MPI", None),
        ];
        for (variables, launcher, local_rank) in cases {
            let place = resolved(variables).unwrap().unwrap();
            assert_eq!(place, Place { launcher, rank: 3, world_size: 8, local_rank, master: None }, "{variables}");
        }
        for nobody in ["", "HOME=/ SLURM_PROCID=0 SLURM_NTASKS=8"] {
            assert_eq!(resolved(nobody).unwrap(), None, "{nobody}");
        }
    }

    #[test]
    fn ranks_without_mpi_use_the_master_address() {
        let torchrun = "RANK=3 WORLD_SIZE=8 LOCAL_RANK=1 MASTER_ADDR=a MASTER_PORT=7000";
        let srun = "SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=8 MASTER_ADDR=a MASTER_PORT=7000 SLURM_JOB_ID=5";
        for (variables, port, run) in [
            (torchrun.to_owned(), 7000, ""),
            (format!("{torchrun} TORCHELASTIC_USE_AGENT_STORE=True TORCHELASTIC_RUN_ID=x"), 7001, "x"),
            (srun.to_owned(), 7000, "5"),
            (format!("{srun} PMI_RANK=3 PMI_SIZE=8"), 7000, "5"),
        ] {
            let master = Master { host: "a".into(), port, run: run.into() };
            assert_eq!(resolved(&variables).unwrap().unwrap().master, Some(master), "{variables}");
        }
        let mpi = "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=8 MASTER_ADDR=a MASTER_PORT=7000";
        assert_eq!(resolved(mpi).unwrap().unwrap().master, None);
        for wrong in ["0", "65535", "x"] {
            let error = resolved(&torchrun.replace("7000", wrong)).unwrap_err();
            assert_eq!(error.to_string(), format!("MASTER_PORT = `{wrong}` is not a port"));
        }
    }

    #[test]
    fn incomplete_and_invalid_variables_are_named() {
        let cases = [
            ("RANK=0", "RANK is set, but WORLD_SIZE is not"),
            ("OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_SIZE is set, but OMPI_COMM_WORLD_RANK is not"),
            ("PMI_RANK=x PMI_SIZE=2", "PMI_RANK = `x` is not a number"),
            ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=-1", "LOCAL_RANK = `-1` is not a number"),
            ("RANK=2 WORLD_SIZE=2", "RANK = 2 of WORLD_SIZE = 2: ranks are counted from 0"),
            ("SLURM_STEP_NUM_TASKS=2", "SLURM_STEP_NUM_TASKS is set, but SLURM_PROCID is not"),
        ];
        for (variables, message) in cases {
            assert_eq!(resolved(variables).unwrap_err().to_string(), message);
        }
    }
}
