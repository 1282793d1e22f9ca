use std::process::ExitCode;

fn main() -> ExitCode {
    vilg::runtime::keep_memory();
    match vilg::cli::run(std::env::args_os()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            vilg::report::error(&error);
            ExitCode::from(vilg::error::exit_of(&error) as u8)
        }
    }
}
