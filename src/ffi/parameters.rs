//! libvirt's texts and typed parameters, copied.

use std::ffi::{CStr, c_char, c_int};
use std::slice;

use virt::sys;

/// Copies a C string; `None` for a null pointer. Bytes that are not UTF-8 are replaced.
///
/// # Safety
/// `text` is null, or points to bytes that end with a NUL and live during the call.
pub(super) unsafe fn copied(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: by this function's contract.
    let text = unsafe { CStr::from_ptr(text) };
    Some(text.to_string_lossy().into_owned())
}

/// A named value (`virTypedParameter`).
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// The name, at most 79 bytes.
    pub name: String,
    /// The value.
    pub value: Value,
}

/// The value of a [`Parameter`].
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A number that is not negative, of either size.
    Number(u64),
    /// A negative number.
    Negative(i64),
    /// A floating-point number.
    Float(f64),
    /// A boolean.
    Flag(bool),
    /// A text.
    Text(String),
    /// A type newer than this list.
    Unknown,
}

impl Value {
    /// Returns the value if it is a number that is not negative.
    pub fn number(&self) -> Option<u64> {
        match self {
            Self::Number(number) => Some(*number),
            _ => None,
        }
    }

    /// Returns the value if it is a text.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    fn signed(number: i64) -> Self {
        u64::try_from(number).map_or(Self::Negative(number), Self::Number)
    }
}

/// Copies libvirt's parameters.
///
/// # Safety
/// `parameters` points to `length` parameters from libvirt; null only if `length` is 0.
pub(super) unsafe fn read(parameters: sys::virTypedParameterPtr, length: c_int) -> Vec<Parameter> {
    let length = usize::try_from(length).unwrap_or(0);
    if parameters.is_null() || length == 0 {
        return Vec::new();
    }
    // SAFETY: by this function's contract.
    let parameters = unsafe { slice::from_raw_parts(parameters, length) };
    parameters
        .iter()
        .map(|parameter| Parameter {
            name: name(parameter),
            // SAFETY: the parameter comes from libvirt, so its type matches its value.
            value: unsafe { value(parameter) },
        })
        .collect()
}

/// Copies libvirt's parameters and frees them.
///
/// # Safety
/// As [`read`]; they are not used afterward.
pub(super) unsafe fn take(parameters: sys::virTypedParameterPtr, length: c_int) -> Vec<Parameter> {
    // SAFETY: by this function's contract; nothing refers to them after the copy.
    unsafe {
        let copy = read(parameters, length);
        sys::virTypedParamsFree(parameters, length);
        copy
    }
}

fn name(parameter: &sys::virTypedParameter) -> String {
    let bytes = parameter.field.map(c_char_to_byte);
    CStr::from_bytes_until_nul(&bytes)
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Returns the byte of a `char`, which may be signed in C.
fn c_char_to_byte(char: std::ffi::c_char) -> u8 {
    char.to_ne_bytes()[0]
}

/// # Safety
/// The parameter was filled in by libvirt.
unsafe fn value(parameter: &sys::virTypedParameter) -> Value {
    let value = &parameter.value;
    let Ok(kind) = u32::try_from(parameter.type_) else {
        return Value::Unknown;
    };
    // SAFETY: each part is read only for the type that has it (virTypedParameterType).
    unsafe {
        match kind {
            sys::VIR_TYPED_PARAM_INT => Value::signed(value.i.into()),
            sys::VIR_TYPED_PARAM_UINT => Value::Number(value.ui.into()),
            sys::VIR_TYPED_PARAM_LLONG => Value::signed(value.l),
            sys::VIR_TYPED_PARAM_ULLONG => Value::Number(value.ul),
            sys::VIR_TYPED_PARAM_DOUBLE => Value::Float(value.d),
            sys::VIR_TYPED_PARAM_BOOLEAN => Value::Flag(value.b != 0),
            sys::VIR_TYPED_PARAM_STRING => Value::Text(copied(value.s).unwrap_or_default()),
            _ => Value::Unknown,
        }
    }
}
