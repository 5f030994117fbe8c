//! Every kernel in every variant, for every architecture that is served, without a GPU.

use espalier_kernels::cuda::{Cache, Module, compile, nvrtc_architectures};

pub const TESTS: &[(&str, fn())] = &[
    ("kernels_compile_for_sm_80", || all_for("sm_80", 80)),
    ("kernels_compile_for_sm_89", || all_for("sm_89", 89)),
    ("kernels_compile_for_sm_90a", || all_for("sm_90a", 90)),
    ("kernels_compile_for_sm_100a", || all_for("sm_100a", 100)),
    ("compiled_kernels_are_kept", compiled_kernels_are_kept),
];

fn all_for(architecture: &str, number: u32) {
    let known = nvrtc_architectures().unwrap();
    if number == 100 && !known.contains(&number) {
        println!("this NVRTC knows {known:?} only");
        return;
    }
    let modules = Module::all();
    assert!(modules.len() > 20, "{}", modules.len());
    for module in modules {
        let cubin = compile(module, architecture).unwrap();
        assert!(
            cubin.starts_with(b"\x7fELF"),
            "{module:?} is no machine code"
        );
    }
}

fn compiled_kernels_are_kept() {
    let folder = std::env::temp_dir().join(format!("espalier-kernels-{}", std::process::id()));
    let cache = Cache::new(&folder);
    let module = Module::all()[0];
    let files = || {
        std::fs::read_dir(&folder)
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect::<Vec<_>>()
    };

    let (first, problem) = cache.compile(module, "sm_80").unwrap();
    assert!(problem.is_none(), "{problem:?}");
    assert_eq!(files().len(), 1);
    let path = files().remove(0);

    // What lies there is used: a file whose code was changed is believed.
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert_ne!(cache.compile(module, "sm_80").unwrap().0, first);

    // A file that is cut short is not, and is replaced.
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    assert_eq!(cache.compile(module, "sm_80").unwrap().0, first);
    assert!(std::fs::read(&path).unwrap().ends_with(&first));

    // Another architecture is another file.
    cache.compile(module, "sm_89").unwrap();
    assert_eq!(files().len(), 2);

    // A folder that cannot be written costs time only.
    let (code, problem) = Cache::new(path).compile(module, "sm_80").unwrap();
    assert!(code == first && problem.is_some());
    std::fs::remove_dir_all(folder).unwrap();
}
