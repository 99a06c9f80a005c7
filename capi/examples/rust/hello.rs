// libminipaged from Rust, without any crate. Usage: hello MODEL
//
//     rustc hello.rs $(minipaged config --library | sed 's/^/-C link-arg=/') \
//         -C link-arg=-Wl,-rpath,$(dirname $(minipaged config --library))
use std::ffi::{c_char, c_void, CStr, CString};
use std::io::Write;
use std::process::ExitCode;

const UNSET: i32 = i32::MIN;
const FOREVER: i64 = -1;

/// The beginning of minipaged_sampling: a struct may end where a field begins, and what is behind it takes
/// defaults.
#[repr(C)]
struct Sampling {
    struct_size: u32,
    n: i32,
    max_tokens: i64,
    min_tokens: i64,
    temperature: f64,
}

#[repr(C)]
struct RequestOptions {
    struct_size: u32,
    priority: i32,
    cache_salt: *const c_char,
    callback: Option<unsafe extern "C" fn(*const Chunk, *mut c_void) -> i32>,
    user_data: *mut c_void,
    stream: i32,
    auto_free: i32,
    free_user_data: Option<unsafe extern "C" fn(*mut c_void)>,
}

/// The beginning of minipaged_chunk.
#[repr(C)]
struct Chunk {
    struct_size: u32,
    choice: i32,
    request: u64,
    token_ids: *const i32,
    num_tokens: u64,
    text: *const u8,
    text_length: u64,
}

extern "C" {
    fn minipaged_engine_create(engine: *mut *mut c_void, model: *const c_char, options: *const c_void) -> i32;
    fn minipaged_engine_destroy(engine: *mut c_void) -> i32;
    fn minipaged_submit_text(
        request: *mut u64,
        engine: *mut c_void,
        text: *const u8,
        text_length: usize,
        sampling: *const Sampling,
        options: *const RequestOptions,
    ) -> i32;
    fn minipaged_wait(engine: *mut c_void, request: u64, timeout_ms: i64) -> i32;
    fn minipaged_request_free(engine: *mut c_void, request: u64) -> i32;
    fn minipaged_error() -> *const c_char;
}

fn check(status: i32) -> Result<(), String> {
    if status >= 0 {
        return Ok(());
    }
    // SAFETY: the text is valid until this thread's next failing call, and is copied here.
    Err(unsafe { CStr::from_ptr(minipaged_error()) }.to_string_lossy().into_owned())
}

/// An engine that is destroyed when it goes out of scope.
struct Engine(*mut c_void);

impl Engine {
    fn new(model: &str) -> Result<Engine, String> {
        let model = CString::new(model).map_err(|error| error.to_string())?;
        let mut handle = std::ptr::null_mut();
        check(unsafe { minipaged_engine_create(&mut handle, model.as_ptr(), std::ptr::null()) })?;
        Ok(Engine(handle))
    }

    /// Continue `prompt`, giving each new piece of text to `on_text`, which answers whether to go on.
    fn stream<F: FnMut(&str) -> bool + Send>(&self, prompt: &str, max_tokens: i64, on_text: F) -> Result<(), String> {
        unsafe extern "C" fn call<F: FnMut(&str) -> bool>(chunk: *const Chunk, user_data: *mut c_void) -> i32 {
            // SAFETY: user_data is the closure below, which outlives the request; text is UTF-8.
            let (chunk, on_text) = unsafe { (&*chunk, &mut *(user_data as *mut F)) };
            let bytes = unsafe { std::slice::from_raw_parts(chunk.text, chunk.text_length as usize) };
            i32::from(!on_text(std::str::from_utf8(bytes).unwrap_or("")))
        }
        let mut on_text = on_text;
        let sampling = Sampling {
            struct_size: std::mem::size_of::<Sampling>() as u32,
            n: UNSET,
            max_tokens,
            min_tokens: UNSET.into(),
            temperature: 0.0,
        };
        let options = RequestOptions {
            struct_size: std::mem::size_of::<RequestOptions>() as u32,
            priority: 0,
            cache_salt: std::ptr::null(),
            callback: Some(call::<F>),
            user_data: &mut on_text as *mut F as *mut c_void,
            stream: 0,
            auto_free: 0,
            free_user_data: None,
        };
        let mut request = 0;
        unsafe {
            check(minipaged_submit_text(&mut request, self.0, prompt.as_ptr(), prompt.len(), &sampling, &options))?;
            let ended = check(minipaged_wait(self.0, request, FOREVER)); // after the last callback
            check(minipaged_request_free(self.0, request))?;
            ended
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        unsafe { minipaged_engine_destroy(self.0) };
    }
}

fn run(model: &str) -> Result<(), String> {
    let engine = Engine::new(model)?;
    engine.stream("Where is the king?", 32, |text| {
        print!("{text}");
        std::io::stdout().flush().is_ok()
    })?;
    println!();
    Ok(())
}

fn main() -> ExitCode {
    let Some(model) = std::env::args().nth(1) else {
        eprintln!("usage: hello MODEL");
        return ExitCode::from(2);
    };
    match run(&model) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hello: {error}");
            ExitCode::FAILURE
        }
    }
}
